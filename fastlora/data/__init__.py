"""From rows of training data to batches of tensors.

In reading order: rows.py reads rows from dicts, and from files with row_files.py; encoding.py turns
each row into token ids and labels, with replies.py and reply_spans.py, which find what the
assistant says in a rendered chat; packing.py joins documents into sequences of one length;
batches.py shuffles, pads and stacks. examples.py defines the records that the files exchange.

Labels are aligned with their tokens, and the loss shifts by one. A label is the token itself if
the token is trained and -100 if it is not; the first label of every document is -100.
"""
