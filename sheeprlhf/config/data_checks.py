"""Checks of the options of the user's own data files."""

from collections.abc import Iterator

from sheeprlhf.structure.data import LocalDataConfig

MAPPED = ("prompt", "response", "chosen", "rejected", "responses", "margin", "messages", "label")  # data.rows.COLUMNS
EXTRAS = ("system", "tools")  # data.rows.CONVERSATION_EXTRAS


def column_problems(data: LocalDataConfig) -> Iterator[str]:
    """Problems of `data.columns` and `data.ignore_columns`."""
    ignored = set(data.ignore_columns)
    users: dict[str, str] = {}
    if not isinstance(data.columns, dict | None):
        yield f"data.columns={data.columns} is no mapping: give for example 'data.columns={{prompt: question}}'"
    for name, value in data.columns.items() if isinstance(data.columns, dict) else ():
        columns = [value] if isinstance(value, str) else value
        if name not in (*MAPPED, *EXTRAS):
            names = ", ".join((*MAPPED, *EXTRAS))
            yield f"data.columns.{name} is no column that is read: give one or more of {names}"
            continue
        if not isinstance(columns, list) or not columns or not all(isinstance(c, str) and c for c in columns):
            yield f"data.columns.{name}={value} must be the name of a column, or a list of names to join"
            continue
        if len(columns) > 1 and name not in MAPPED[:4]:
            yield f"data.columns.{name}={value}: only texts are joined; give the name of one column"
        for column in columns:
            if column in ignored:
                yield f"data.columns.{name} names {column}, which data.ignore_columns leaves out: remove one of the two"
            if column in users:
                yield f"data.columns names {column} twice, in {users[column]} and {name}: give each column one use"
            users[column] = name
    if any(not name for name in data.ignore_columns):
        yield "data.ignore_columns has an empty name: remove it"
