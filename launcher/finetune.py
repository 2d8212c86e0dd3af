"""Fine-tunes a Hugging Face model in stages; see ``ds_interlock/jobs/finetune.py``."""

from ds_interlock.jobs.finetune import main

if __name__ == "__main__":
    main()
