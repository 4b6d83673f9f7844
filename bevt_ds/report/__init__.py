"""What people look at: `bevt report`, `bevt runs` and `bevt compare` read the folders that runs write, and only read.

Start with run_files.py, which reads one folder and names what is damaged in it. page.py turns runs into one HTML file
with the template next to it; charts.py draws the curves; listing.py is the table of all runs below a folder.
"""
