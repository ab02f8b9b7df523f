"""Text: token ids and chats, read from the tokenizer files of a Hugging Face folder.

The results are those of transformers 5.23's AutoTokenizer for the same folder. In reading order:

    tokenizer.py          Tokenizer: what users hold
    boundaries.py         where texts begin (BOS) and replies end (stop ids)
    tokenizer_files.py    a folder's files, parsed and checked
    tokenizer_json.py     contents of tokenizer.json that would end the process
    special_tokens.py     which tokens are special, from four files
    backend.py            the tokenizers library's object, set up as transformers sets it up
    chat_template.py      a chat as text, and which characters of it are replies
    template_sandbox.py   untrusted Jinja templates, run in jinja2's sandbox
    template_names.py     the tag, filter and functions that transformers adds to Jinja
    template_budget.py    how much work a template may do
"""
