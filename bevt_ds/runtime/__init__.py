"""What a run needs while it runs, whatever it trains: engine, ranks, run folder, checkpoints, log, optimizer groups.

engine*.py alone import DeepSpeed; checkpoint.py commits and verifies; run_dir.py owns the names in a
run's folder; distributed.py the ranks; logging.py the log lines; run_record.py says how a run was made,
console.py keeps what it prints. Start with engine.py.
"""
