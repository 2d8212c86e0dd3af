"""Does a configuration train what it says? Checked on a small random model, against plain autograd.

                      ┌─► K processes, the real engine, float32 ──┐
    "interlock"  plan │                                           ├─► compared, stage by stage
      section  ───────┼─► the same plan in one process, float64 ──┤
                      │                                           │
                      └─► autograd on truncated graphs, float64 ──┘
                          (reference.py: no schedule, no relays, no messages)

The processes also run the same samples in other numbers of micro-batches, which must agree to rounding; and
with streaming switched, and with a window as long as the pipeline beside ordinary backpropagation, which must
agree bit for bit.
"""
