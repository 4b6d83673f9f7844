"""Training: the loop, and what each kind of training gives to it.

loop.py is the loop; task.py what it asks of a kind of training; pretraining.py, finetuning.py and tokenizing.py are the
three; nonfinite.py and replay.py deal with steps that go wrong; dry_run.py prints what a run would be. Start with
loop.py.
"""
