"""Pages about runs and studies: `runs.write` the HTML report, `compare` the table of the terminal.

`page` draws plain data (sections) as one HTML file; the others say what is on it.
"""
