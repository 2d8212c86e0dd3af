"""Trains a small Transformer on text, in stages; see ``ds_interlock/jobs/train_lm.py``."""

from ds_interlock.jobs.train_lm import main

if __name__ == "__main__":
    main()
