"""What a configuration would cost before anybody rents the machines: profiles, forecasts, pictures.

Pure Python, like ``schedule``: planning needs neither torch nor a GPU.
"""
