"""What a forger does who holds the operator's key: a run's files changed, and signed again."""

import hashlib
import json

from fedunlearn.evidence.dossier import write_dossier
from fedunlearn.evidence.keys import read_private_key


def again(folder, signed, **change):
    """Sign the folder again with the operator's own key, ``result.json`` changed: a forger who holds the key."""
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | change))
    write_dossier(folder, read_private_key(signed / "operator", outside=folder))


def forged(folder, signed, change):
    """Let ``change`` alter the content of result.json, and make event log and dossier say the same: all but figures."""
    result = json.loads((folder / "result.json").read_text())
    change(result)
    (folder / "result.json").write_text(json.dumps(result))
    facts = {"result written": {"sha256": hashlib.sha256((folder / "result.json").read_bytes()).hexdigest()}}
    facts["audited"] = {"verdict": result.get("verdict")}
    previous, lines = "0" * 64, []
    for line in (folder / "events.jsonl").read_bytes().splitlines():
        event = json.loads(line)
        event |= {"previous": previous, "facts": event["facts"] | facts.get(event["event"], {})}
        lines.append(json.dumps(event).encode())
        previous = hashlib.sha256(lines[-1]).hexdigest()
    (folder / "events.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    again(folder, signed)


def lost(*path):
    """Return a change that takes a block out of result.json."""

    def change(result):
        block = result
        for name in path[:-1]:
            block = block[name]
        del block[path[-1]]

    return change


def told(value, *path):
    """Return a change that writes ``value`` into result.json."""

    def change(result):
        block = result
        for name in path[:-1]:
            block = block[name]
        block[path[-1]] = value

    return change


def in_audits(folder, change):
    for path in (folder / "audits").glob("*.json"):
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))


def in_audit(folder, name, change):
    path = folder / "audits" / f"{name}.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def unsigned(folder):
    for name in ("dossier.json", "dossier.sig"):
        (folder / name).unlink()


def without(phase, round):
    """Return a change that leaves a step out of rounds.jsonl."""
    return lambda steps: [step for step in steps if (step["phase"], step["round"]) != (phase, round)]


def altered(name, **change):
    """Return a change of all steps of a phase."""
    return lambda steps: [step | change if step["phase"] == name else step for step in steps]


def in_rounds(folder, change):
    header, *steps = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [header, *change(steps)]))


def exchanged(one, other):
    """Return a change by which two classes bear each other's names."""

    def change(result):
        names = {one: other, other: one}
        result["classes"] = [names.get(name, name) for name in result["classes"]]
        for block in (result["original"], result["unlearned"], *result["oracles"].values()):
            told = block["accuracy"]["per_class"]
            told[one], told[other] = told[other], told[one]

    return change


def asked_for(folder, signed, forget):
    """Let recipe and rounds say that ``forget`` was asked for."""
    header, *steps = (folder / "rounds.jsonl").read_text().splitlines()
    header = json.loads(header)
    header["recipe"]["unlearn"]["forget"] = forget
    (folder / "rounds.jsonl").write_text("\n".join([json.dumps(header), *steps, ""]))
    forged(folder, signed, told(forget, "recipe", "unlearn", "forget"))


def dossier_of(folder):
    return json.loads((folder / "dossier.json").read_text())


def resigned(folder, signed, **change):
    """Sign a dossier that says something else, and change nothing else."""
    data = json.dumps(dossier_of(folder) | change).encode()
    (folder / "dossier.json").write_bytes(data)
    (folder / "dossier.sig").write_bytes(read_private_key(signed / "operator", outside=folder).sign(data))


def in_events(folder, signed, change):
    """Change what the events say, and chain and sign them anew."""
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    for line in lines:
        change(line)
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    forged(folder, signed, lambda result: None)
