"""From rows of training data to batches of tensors.

In reading order: sources.py finds files and iterables, row_files.py and table_files.py read files;
rows.py checks rows, row_forms.py brings them into one form; row_steps.py turns a row into token ids
and labels, with replies.py and reply_spans.py, which find what the assistant says in a rendered
chat; row_chunks.py runs these steps for a chunk of rows, workers.py for chunks on all cores;
encoding.py collects the examples, long_rows.py cuts what is too long, left_out.py counts it;
reading.py does all of this for an argument of train, with cache.py, and mixing.py mixes its sources
by weight; packing.py joins documents into sequences of one length; batches.py shuffles, pads and
stacks. streams.py does the same for data that do not fit into memory. examples.py defines the
records that the files exchange.

Labels are aligned with their tokens, and the loss shifts by one. A label is the token itself if
the token is trained and -100 if it is not; the first label of every document is -100.
"""
