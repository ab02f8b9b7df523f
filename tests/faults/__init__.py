"""The fault suite: kills, damaged files and bad calls (issue 16).

Reading order: folders (what is damaged), worker and server (processes that may die), case and
values (one fault and its verdict), damage, then the tables files_* and calls_*, cases (all of them
by name), kills, full (the complete form).
"""
