"""The operator's keys: Ed25519, in PEM files outside the folder of any run."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from fedunlearn.errors import EvidenceError


def make_keys(path: Path) -> Ed25519PublicKey:
    """Write a new private key to ``path``, readable by its owner alone, and its public key to ``path`` + ``.pub``.

    Returns:
        The public key.

    Raises:
        EvidenceError: one of the files is there already, or cannot be written.
    """
    public = path.with_name(f"{path.name}.pub")
    for file in (path, public):  # before one of two is written
        if file.exists():
            raise EvidenceError(f"{file} is there already: a key is never overwritten; choose another --out")
    key = Ed25519PrivateKey.generate()
    for file, data, mode in (
        (path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600),
        (public, key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), 0o644),
    ):
        try:
            with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as out:
                out.write(data)
        except OSError as error:
            raise EvidenceError(
                f"{file}: the key cannot be written ({error.strerror}): choose another --out"
            ) from error
    return key.public_key()


def read_private_key(path: Path, *, outside: Path) -> Ed25519PrivateKey:
    """Return the private key in ``path``.

    Args:
        path: a PEM file as ``make_keys`` writes it.
        outside: the folder of the run, in which a private key must not lie.

    Raises:
        EvidenceError: the file is missing, holds no such key, or lies in the folder of the run.
    """
    if path.resolve().is_relative_to(outside.resolve()):
        raise EvidenceError(f"{path}: the private key lies in the folder of the run, which is handed on: move it away")
    try:
        text = path.read_bytes()
        if b"PUBLIC KEY" in text:
            raise EvidenceError(f"{path} is a public key: to sign, give the private one it belongs to")
        key = load_pem_private_key(text, password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise EvidenceError(
            f"{path}: expected a private key in PEM, but {why}: make one with fedunlearn keygen"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise EvidenceError(f"{path}: expected an Ed25519 key, got {type(key).__name__}: use fedunlearn keygen")
    return key
