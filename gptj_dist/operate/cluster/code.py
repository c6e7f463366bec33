"""The join code: where a cluster's head is, and the secret that opens it, short enough to be typed.

`XXXXX-XXXXX-XXXXX-XXXXX-XXXXX` holds an IPv4 address, a port, a secret of 64 bits and a checksum of 13 bits. Without
the address, for `--discover`, it is `XXXXX-XXXXX-XXXXX`, with a checksum of 11 bits. The alphabet is Crockford's base
32: no I, L, O or U, either case. The checksum is a CRC, which finds each mistyped character and each swap of two
neighbours.
"""

from __future__ import annotations

import hashlib
import ipaddress
import secrets
from dataclasses import dataclass
from functools import cached_property

from gptj_dist.errors import ConfigurationError

SECRET_BITS = 64
KEY_BYTES = 32

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_LOOKALIKES = str.maketrans("OIL", "011")
_GROUP = 5
_BITS_OF_CHARACTER = 5
_PLACE_BITS = 48
_CRC13 = 0x3CF5
_CRC11 = 0xB85
"""Generators with their leading bit: CRC-13-BBC and CRC-11."""

_SCRYPT = {"n": 1 << 14, "r": 8, "p": 1}
_SALT = b"gptj-dist join code 1"


@dataclass(frozen=True, slots=True)
class Place:
    """Where the head's GCS listens: an IPv4 address and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True)
class JoinCode:
    """A parsed code.

    Args:
        secret: a number of 64 bits.
        place: None in a code for `--discover`.
    """

    secret: int
    place: Place | None

    @classmethod
    def new(cls, place: Place) -> JoinCode:
        """A code with a random secret."""
        return cls(secrets.randbits(SECRET_BITS), place)

    @classmethod
    def parse(cls, text: str) -> JoinCode:
        """Reads a typed code. Case, spaces and hyphens do not matter; O is 0, I and L are 1.

        Raises:
            ConfigurationError: it is incomplete or mistyped.
        """
        characters = text.upper().replace("-", "").replace(" ", "").translate(_LOOKALIKES)
        if strange := sorted(set(characters) - set(_ALPHABET)):
            raise ConfigurationError(f"the join code has no {strange[0]!r}; type it as `gptj-dist up` printed it")
        if len(characters) not in (15, 25):
            raise ConfigurationError(
                f"a join code has 25 letters and digits, or 15 without an address; this has {len(characters)}"
            )
        number = sum(_ALPHABET.index(c) << (_BITS_OF_CHARACTER * i) for i, c in enumerate(reversed(characters)))
        has_place = len(characters) == 25
        if _remainder(number, _CRC13 if has_place else _CRC11):
            raise ConfigurationError("the join code has a typing error: its checksum does not match")
        if not has_place:
            return cls(number >> 11, None)
        number >>= 13
        secret, place = number & ((1 << SECRET_BITS) - 1), number >> SECRET_BITS
        return cls(secret, Place(str(ipaddress.IPv4Address(place >> 16)), place & 0xFFFF))

    def __str__(self) -> str:
        if self.place is None:
            return _grouped(_with_checksum(self.secret, _CRC11), 15)
        place = int(ipaddress.IPv4Address(self.place.host)) << 16 | self.place.port
        return _grouped(_with_checksum(place << SECRET_BITS | self.secret, _CRC13), 25)

    @property
    def without_place(self) -> JoinCode:
        """The code for `--discover`."""
        return JoinCode(self.secret, None)

    @property
    def ray_token(self) -> str:
        """What Ray's processes show one another."""
        return self._derived[:KEY_BYTES].hex()

    @property
    def probe_key(self) -> bytes:
        """Key of the beacon and of measurements between members."""
        return self._derived[KEY_BYTES:]

    @cached_property
    def _derived(self) -> bytes:
        """Slow on purpose: who hears a beacon has to pay that for each guess of the secret."""
        secret = self.secret.to_bytes(SECRET_BITS // 8, "big")
        return hashlib.scrypt(secret, salt=_SALT, dklen=2 * KEY_BYTES, **_SCRYPT)


def _with_checksum(number: int, generator: int) -> int:
    shifted = number << (generator.bit_length() - 1)
    return shifted | _remainder(shifted, generator)


def _remainder(number: int, generator: int) -> int:
    """Of the division of polynomials over the field of two elements."""
    width = generator.bit_length()
    while number.bit_length() >= width:
        number ^= generator << (number.bit_length() - width)
    return number


def _grouped(number: int, length: int) -> str:
    characters = "".join(_ALPHABET[number >> (_BITS_OF_CHARACTER * i) & 31] for i in reversed(range(length)))
    return "-".join(characters[i : i + _GROUP] for i in range(0, length, _GROUP))
