"""A run's folder, read while the run goes on, and the page that shows it.

records.py reads the steps; page.py fills page.html.
"""
