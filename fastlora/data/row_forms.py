"""standard_row(): a row in one of the four standard kinds, from the forms that data sets use.

Renamed columns, ShareGPT's conversations, content in parts and JSON inside texts are converted
here, so that the rest of the package sees one form.
"""

import json
from collections.abc import Mapping
from typing import Any

from fastlora.arguments import Rule
from fastlora.checkpoints.json_text import first_line, unique_names

Row = Mapping[str, Any]

# Who speaks in ShareGPT's rows ({"from", "value"}), as FastChat and LLaMA-Factory write them.
_SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "model", "function_call"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "function", "observation", "function_response"), "tool"),
}

_CHATS = ("messages", "prompt", "completion")  # columns that may hold messages

# Names that `columns` may map to columns of the data. "role" and "content" are keys of a message,
# the last three belong to rows with preferences (losses/preference_rows.py).
COLUMN_NAMES = (
    *_CHATS,
    "instruction",
    "input",
    "output",
    "text",
    "tools",
    "role",
    "content",
    "chosen",
    "rejected",
    "label",
)


def _are_columns(value: Any) -> bool:
    return isinstance(value, dict) and all(
        name in COLUMN_NAMES and isinstance(own, str) and own for name, own in value.items()
    )


COLUMNS = Rule(
    _are_columns,
    f"a dict from names in {list(COLUMN_NAMES)} to the data's, such as"
    ' {"prompt": "question", "completion": "answer"}',
)


def standard_row(row: Any, columns: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A new row, with messages and tools in the form of OpenAI's API.

    - `columns` renames: standard name -> name in the data.
    - "conversations" become "messages", with "from" and "value" as role and content, and the row's
      "system" as first message.
    - Messages and tools may be JSON texts, as in CSV files.
    - The arguments of a tool call become a dict if they are JSON text: chat templates write them as
      JSON, which would quote a text once more.

    Columns that are not known stay. Converting a row twice changes nothing.

    Raises:
        ValueError: a value cannot be converted; says which.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"a {type(row).__name__}, not a dict: {row!r:.60}")
    new = _renamed(row, columns or {})
    if "messages" not in new and "conversations" in new:
        new["messages"] = new.pop("conversations")
        system = new.get("system")
        if isinstance(system, str) and system and isinstance(new["messages"], list):
            new["messages"] = [{"role": "system", "content": system}, *new["messages"]]
    keys = columns or {}
    for name in _CHATS:
        if (chat := _messages(new.get(name), name)) is not None:
            new[name] = [_message(m, n, keys) for n, m in enumerate(chat, 1)]
    if "tools" in new:
        new["tools"] = _tools(new["tools"])
        if not new["tools"]:
            del new["tools"]
    return new


def without_nulls(value: Any) -> Any:
    """A value without the keys of its dicts whose value is None.

    Arrow gives every dict of a column the same keys, and None for those that a row lacks: one tool
    call's arguments would get the names of all other tools' parameters.
    """
    if isinstance(value, Mapping):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [without_nulls(v) for v in value]
    return value


def _renamed(row: Row, columns: Mapping[str, str]) -> dict[str, Any]:
    renamed = {own: name for name, own in columns.items() if own in row}
    # A column that has a standard name but is not the one that the caller chose for it.
    hidden = {name for name in renamed.values() if columns[name] != name}
    return {
        renamed.get(key, key): value
        for key, value in row.items()
        if key in renamed or key not in hidden
    }


def _messages(value: Any, name: str) -> list[Any] | None:
    """The messages in a column; None if it holds a plain text or something else."""
    if isinstance(value, str) and name == "messages":
        value = _json(value, name)
    return list(value) if isinstance(value, list | tuple) else None


def _message(message: Any, number: int, columns: Mapping[str, str]) -> Any:
    """A message with role and content. Other values are returned unchanged, to be refused later."""
    if not isinstance(message, Mapping):
        return message
    new = dict(message)
    for name in ("role", "content"):
        if (own := columns.get(name, name)) != name and own in new:
            new[name] = new.pop(own)
    if "role" not in new and "from" in new:
        new = _from_sharegpt(new, number)
    content = new.get("content")
    if isinstance(content, list | tuple):
        new["content"] = [_part(part, number) for part in content]
    if new.get("tool_calls"):
        new["tool_calls"] = [_tool_call(call, number) for call in _list(new["tool_calls"], number)]
    return new


def _from_sharegpt(message: dict[str, Any], number: int) -> dict[str, Any]:
    speaker, value = message.pop("from"), message.pop("value", None)
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        raise ValueError(
            f"message {number} is from {speaker!r:.60}, expected one of {sorted(_SPEAKERS)}"
        )
    if not isinstance(value, str):
        raise ValueError(f'message {number}: "value" is a {type(value).__name__}, expected text')
    role = _SPEAKERS[speaker]
    if speaker != "function_call":
        return {"role": role, "content": value, **message}
    calls = _json(value, f"message {number}, function_call")
    calls = calls if isinstance(calls, list) else [calls]
    as_openai = [{"type": "function", "function": call} for call in calls]
    return {"role": role, "content": "", "tool_calls": as_openai, **message}


def _part(part: Any, number: int) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if not isinstance(part, Mapping) or kind != "text" or not isinstance(part.get("text"), str):
        raise ValueError(
            f"message {number} has a part of content of type {kind!r:.60}; expected parts"
            ' {"type": "text", "text": ...}'
        )
    return dict(part)


def joined_text(message: Row) -> Row:
    """A message whose content is one text: its parts of text, joined."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": "".join(part["text"] for part in content)}


def _list(calls: Any, number: int) -> list[Any]:
    calls = _json(calls, f"message {number}, tool_calls") if isinstance(calls, str) else calls
    if not isinstance(calls, list | tuple):
        raise ValueError(f"message {number}: tool_calls must be a list; got {calls!r:.60}")
    return list(calls)


def _tool_call(call: Any, number: int) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise ValueError(f"message {number}: a tool call must be a dict; got {call!r:.60}")
    inner = call.get("function", call)
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise ValueError(f"message {number}: a tool call has no name: {call!r:.60}")
    arguments = inner.get("arguments")
    if isinstance(arguments, str):
        arguments = _json(arguments or "{}", f"message {number}, arguments of {inner['name']}")
        if not isinstance(arguments, dict):
            raise ValueError(
                f"message {number}: the arguments of {inner['name']} must be a JSON object"
            )
        inner = {**inner, "arguments": arguments}
    return {**call, "function": dict(inner)} if "function" in call else dict(inner)


def _tools(tools: Any) -> list[dict[str, Any]]:
    """Descriptions of functions. A list, or the JSON text of one, or a list of JSON texts."""
    if tools is None or tools == "":
        return []
    tools = _json(tools, "tools") if isinstance(tools, str) else tools
    if isinstance(tools, list | tuple):
        tools = [_json(tool, "tools") if isinstance(tool, str) else tool for tool in tools]
        if all(isinstance(tool, Mapping) for tool in tools):
            return [dict(tool) for tool in tools]
    raise ValueError(f"tools must be a list of dicts, or its JSON text; got {tools!r:.60}")


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=unique_names)
    except RecursionError as error:
        raise ValueError(f"{what} is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{what} is not JSON: {first_line(error)}: {text!r:.60}") from error
