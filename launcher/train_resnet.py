"""Trains a ResNet on small images, in stages; see ``ds_interlock/jobs/train_resnet.py``."""

from ds_interlock.jobs.train_resnet import main

if __name__ == "__main__":
    main()
