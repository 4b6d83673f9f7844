"""What a run needs while it runs, whatever it trains: engine, ranks, run folder, checkpoints, log, optimizer groups.

engine.py and the two files next to it alone import DeepSpeed; checkpoint.py says what a checkpoint is, commit.py writes
one, continuing.py takes it up; run_dir.py owns the names in a run's folder; distributed.py ranks, heartbeat.py their
deadline; logging.py and run_log.py the log lines; run_record.py says how a run was made. Start with engine.py.
"""
