"""What people look at: `bevt report`, `runs`, `compare`, `checkpoint`, `view`. Runs' folders are only read.

Start with run_files.py, which reads one folder and names what is damaged in it. page.py turns runs into one HTML file
with the template next to it; charts.py draws the curves; listing.py is the table of all runs below a folder, compare.py
puts settings side by side, checkpoints.py looks into commits, view.py draws samples of shards.
"""
