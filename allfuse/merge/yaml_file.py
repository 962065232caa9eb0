"""Plain data in a YAML file that a stranger may have written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from allfuse.base.errors import MergeError

MOST_BYTES = 1_000_000


def load_yaml(path: Path) -> Any:
    """The plain data in a YAML file.

    Raises:
        MergeError: it cannot be read, with line and column.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise MergeError(f"{path} has more than {MOST_BYTES:,} bytes, and is no recipe")
        return _Loader(content).get_single_data()
    except OSError as error:
        raise MergeError(f"{path} cannot be read: {error.strerror or error}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        why = error.problem or error.context
        if "single document" in str(error):
            why = "a second merge, after another one; next: a file for each"
        raise MergeError(f"{path}{where}: {why}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise MergeError(f"{path} is no YAML: {error}") from error


class _Loader(yaml.SafeLoader):
    """Refuses a key that is said twice, of which one would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key.value!r} is said twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)
