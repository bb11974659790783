"""What columns and class numbers mean: by usual names, by the shape of known files, or as the user says."""

import re
from pathlib import Path

from dataset.rows import DataError

# Column names are compared without case, spaces, hyphens and underscores: "Class Index" is "classindex".
TEXT_NAMES = {"text", "content", "article", "body", "description", "news", "sentence", "review"}
TEXT_NAMES |= {"文本", "内容", "正文", "新闻"}
LABEL_NAMES = {"label", "category", "class", "classindex", "topic", "target", "section", "labeltext", "labelname"}
LABEL_NAMES |= {"标签", "类别", "分类"}
TITLE_NAMES = {"title", "headline", "标题"}
DOCUMENT_NAMES = {"filename", "articleid", "documentid", "docid", "id", "文件名"}

AG_NEWS_COLUMNS = ["class index", "title", "description"]
AG_NEWS_CLASSES = ["World", "Sports", "Business", "Sci/Tech"]


def plain_name(name: str) -> str:
    """A column name without case, spaces, hyphens and underscores."""
    return re.sub(r"[\s_-]+", "", name).casefold()


def name_columns(head: list[str], sample: list[list[str]], asked: dict[str, str | None]) -> tuple[list[str], bool]:
    """Column names, and whether the first line holds them.

    Args:
        head: the fields of the first line.
        sample: the records of the first lines, as far as they can be read.
        asked: columns by role as the user names them, None where the usual names are to tell.
    """
    if any(name is not None and name.isdecimal() for name in asked.values()):
        return [str(number) for number in range(1, len(head) + 1)], False
    known = TEXT_NAMES | LABEL_NAMES | TITLE_NAMES | DOCUMENT_NAMES
    if any(plain_name(name) in known or name in asked.values() for name in head):
        return [name.strip() for name in head], True

    def holds_numbers(column: int) -> bool:
        numbers = sum(fields[column].strip().isdecimal() for fields in sample)
        return head[column].strip().isdecimal() and 10 * numbers >= 9 * len(sample)

    if len(head) == 3 and holds_numbers(0):
        return AG_NEWS_COLUMNS, False
    if len(head) == 2 and holds_numbers(1):
        return ["text", "class index"], False
    if len(head) == 2 and holds_numbers(0):
        return ["class index", "text"], False
    return head, True


def find_roles(path: Path, columns: list[str], asked: dict[str, str | None]) -> dict[str, str]:
    """Which column holds the text, the label, the title and the article's name; the last two are optional.

    Raises:
        DataError: none or several columns may hold the text or the label, or a column asked for is not there.
    """
    listed = ", ".join(columns) or "none"
    found = {}
    for role, names in (("text", TEXT_NAMES), ("label", LABEL_NAMES), ("title", TITLE_NAMES)):
        if asked.get(role) is not None:
            if asked[role] not in columns:
                raise DataError(f"{path}: no column {asked[role]!r}; the columns are: {listed}")
            found[role] = [asked[role]]
        else:
            found[role] = [name for name in columns if plain_name(name) in names and name not in asked.values()]
    if not found["text"]:
        found["text"], found["title"] = found["title"], []  # a file of headlines
    for role in ("text", "label"):
        if len(found[role]) != 1:
            doubt = f"{' or '.join(found[role])}?" if found[role] else "no usual name among them."
            raise DataError(
                f"{path}: which column is the {role}: {doubt} The columns are: {listed}. "
                "Name them with --text_column and --label_column (in the notebook TEXT_COLUMN and LABEL_COLUMN)"
            )
    found["document"] = [name for name in columns if plain_name(name) in DOCUMENT_NAMES and name not in asked.values()]
    return {role: names[0] for role, names in found.items() if names}


def find_class_names(
    path: Path, numbers: set[int], roles: dict[str, str], class_names: str | Path | list[str] | None
) -> tuple[list[str], int, str]:
    """What class numbers stand for: as the user says, by a `class.txt` beside the file, or as in AG News.

    Args:
        numbers: the class numbers that occur.
        roles: the columns as `find_roles` returns them.
        class_names: the names in the order of the numbers, or a file with one a line.

    Returns:
        The names, the number of the first one (0 or 1), and a sentence for the user where he did not list them.

    Raises:
        DataError: there are no names, or it is unclear where counting starts.
    """
    beside = path.parent / "class.txt"
    is_ag_news = [plain_name(roles.get(role, "")) for role in ("title", "text")] == ["title", "description"]
    note = ""
    if isinstance(class_names, list):
        names = class_names
    elif class_names is not None or beside.is_file():
        source = Path(class_names) if class_names is not None else beside
        if not source.is_file():
            raise DataError(f"{source}: no such file of class names")
        try:
            text = source.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{source}: class names must be UTF-8 ({error})") from None
        names = [line.strip() for line in text.splitlines() if line.strip()]
        note = f"class names from {source.name}: {', '.join(names)}"
    elif numbers == {1, 2, 3, 4} and is_ag_news:
        names = AG_NEWS_CLASSES
        note = f"class numbers 1 to 4 read as AG News: {', '.join(names)}"
    else:
        raise DataError(
            f"{path}: labels are class numbers ({min(numbers)} to {max(numbers)}); name them with "
            "--class_names FILE (in the notebook CLASS_NAMES), one name a line in the order of the numbers"
        )
    if 0 not in numbers and len(names) not in numbers:
        raise DataError(
            f"{path}: {len(names)} class names, but neither class 0 nor class {len(names)} occurs: "
            "it is unclear whether counting starts at 0 or 1"
        )
    return names, 0 if 0 in numbers else 1, note
