"""Does a configuration train what it says? Checked on a small random model, against plain autograd.

                      ┌─► K processes, the real engine, float32 ──┐
    "interlock"  plan │                                           ├─► compared, stage by stage
      section  ───────┼─► the same plan in one process, float64 ──┤
                      │                                           │
                      └─► autograd on truncated graphs, float64 ──┘
                          (reference.py: no schedule, no relays, no messages)

The processes also run the same samples in other numbers of micro-batches, with streaming switched
over, and with a window as long as the pipeline beside ordinary backpropagation. The first must agree
to rounding; the others bit for bit.

    reference.py   the small model, its data, and the gradients it should have
    job.py         the K processes, and what each of them runs
    checks.py      what is compared with what, and how closely
"""
