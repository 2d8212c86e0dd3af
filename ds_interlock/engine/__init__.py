"""``InterlockEngine`` on DeepSpeed's pipeline engine, and the parts it is made of."""
