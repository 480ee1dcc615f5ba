"""report.html: a validation as a page to read, print and send. One file, no script, no network.

Everything on it comes from report.json, the bundle's manifest and the pictures that were compared. `page.py` lists its
sections; each is a file in `sections/` that picks what it shows, and a template of the same name. jinja2 and matplotlib
are imported when a page is made.
"""
