"""Reads the journals of a workspace as an outsider: what is still to do, by the files alone."""

import json
from pathlib import Path


def records(journal: Path) -> list[dict]:
    """The whole lines of a journal, none if it is not there; a torn last line does not count."""
    if not journal.exists():
        return []
    return [json.loads(line) for line in journal.read_bytes().split(b"\n")[:-1]]


def journal(folder: Path) -> Path:
    """The delivery queue of a workspace."""
    return folder / "delivery-queue" / "queue.jsonl"


def pending(folder: Path) -> dict[str, list[str]]:
    """What waits in the journal of a workspace, by recipient, with the texts of the pieces left."""
    waiting: dict[str, dict] = {}
    for note in records(journal(folder)):
        name = note.get("id")
        if note["type"] == "enqueue":
            waiting[note["delivery"]["id"]] = {"sent": 0} | note["delivery"]
        elif note["type"] == "ack" and name in waiting:
            waiting[name]["sent"] += 1
            if waiting[name]["sent"] == len(waiting[name]["pieces"]):
                del waiting[name]
        elif note["type"] == "failed":
            waiting.pop(name, None)
    found: dict[str, list[str]] = {}
    for each in waiting.values():
        place = f"{each['channel']} {each['account']} {each['peer']}"
        found.setdefault(place, []).extend(each["pieces"][each["sent"] :])
    return found


def inbox_is_empty(folder: Path) -> bool:
    """Whether all that came in is answered."""
    notes = records(folder / ".inbox.jsonl")
    ended = {note["id"] for note in notes if note["type"] == "done"}
    return {n["message"]["ids"][0] for n in notes if n["type"] == "message"} <= ended
