"""Training: the loop, and what pretraining and fine-tuning give to it.

pretraining.py and finetuning.py set up a run in the order in which things depend on each other; mixup.py mixes labelled
clips; dry_run.py prints what a run would be. Start with pretraining.py.
"""
