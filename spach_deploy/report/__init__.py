"""report.html: a validation as a page to read, print and send. One file, no script, no network.

Everything on it comes from report.json, the bundle's manifest and the images that were compared. `page.SECTIONS` lists
its sections. For each, a function in `validation_sections` or `bundle_sections` selects what to show, and a template of
the same name shows it. jinja2 and matplotlib are imported when a page is made.
"""
