"""Who may ask, and how much: the keys of a server, their tenants, and what each tenant has used. No clock, no HTTP."""

import hashlib
import hmac
import math
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from dilaserve.errors import ConfigError, Overloaded
from dilaserve.system import files

MOST_BYTES = 4 * 2**20  # of a key file
MINUTE = 60.0
Limit = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Digest = Annotated[str, Meta(pattern="^[0-9a-fA-F]{64}$")]


class Tenant(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry of the key file: a name, its key or the SHA-256 of it, and its limits.

    `accuracy_budget` is in percentage points, at most that of the server. `requests_per_minute` may come at once, and
    then as they are paid back; `concurrency` counts choices that run or wait. A request's `priority` is that of its
    tenant unless it asks for another, which may be no higher than `max_priority`. `admin` may change the plan.
    """

    name: Annotated[str, Meta(min_length=1, max_length=128)]
    key: Annotated[str, Meta(min_length=8)] | None = None
    sha256: Digest | None = None
    accuracy_budget: Annotated[float, Meta(ge=0.0, le=100.0)] | None = None
    requests_per_minute: Limit | None = None
    concurrency: Limit | None = None
    priority: int = 0
    max_priority: int | None = None
    admin: bool = False

    @property
    def digest(self) -> bytes:
        return bytes.fromhex(self.sha256) if self.sha256 else digest(self.key or "")

    @property
    def highest_priority(self) -> int:
        return self.priority if self.max_priority is None else self.max_priority


class KeyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file: `[[tenant]]` tables."""

    tenant: list[Tenant]


class Used(msgspec.Struct):
    """What a tenant has used: choices now, and requests that it may still send at once."""

    running: int = 0
    left: float = math.inf
    at: float = 0.0


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def read(file: Path) -> list[Tenant]:
    """The tenants of a key file. Raises `ConfigError`, which repeats no key."""
    try:
        text = files.read(file, MOST_BYTES).decode()
        tenants = msgspec.convert(tomllib.loads(text), KeyFile).tenant
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the key file {file}: {reason(error)}", param="api_key_file") from error
    check(tenants, file)
    return tenants


def reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, msgspec.ValidationError):
        return str(error)
    return f"it is not valid TOML: {error}" if isinstance(error, tomllib.TOMLDecodeError) else "it is not UTF-8 text"


def check(tenants: Sequence[Tenant], file: Path) -> None:
    """Each tenant has one key, and no two share a key. Several entries may have one name: they are one tenant."""
    if not tenants:
        raise ConfigError(f"the key file {file} has no [[tenant]]", param="api_key_file")
    seen: dict[bytes, str] = {}
    for one in tenants:
        if (one.key is None) == (one.sha256 is None):
            problem = f"tenant {one.name!r} needs either key or sha256"
        elif one.digest in seen:
            problem = f"tenants {seen[one.digest]!r} and {one.name!r} have the same key"
        elif one.highest_priority < one.priority:
            problem = f"tenant {one.name!r} has a max_priority below its priority"
        else:
            seen[one.digest] = one.name
            continue
        raise ConfigError(f"the key file {file}: {problem}", param="api_key_file")


class Keyring:
    """The keys that are valid now, and what their tenants have used; `now` is in seconds by any one clock."""

    def __init__(self, tenants: Sequence[Tenant] = ()) -> None:
        self.used: dict[str, Used] = {}
        self.replace(tenants)

    def replace(self, tenants: Sequence[Tenant]) -> None:
        """From now on these keys; what tenants have used stays counted."""
        self.tenants = list(tenants)
        self.digests = [one.digest for one in tenants]
        self.used = {one.name: self.used.get(one.name, Used()) for one in tenants}

    def owner(self, sent: str) -> Tenant | None:
        """Whose key this is. All keys are compared, each in a time that does not depend on what was sent."""
        found, given = None, digest(sent)
        for tenant, known in zip(self.tenants, self.digests, strict=True):
            if hmac.compare_digest(given, known):
                found = tenant
        return found

    def begin(self, tenant: Tenant, choices: int, now: float) -> None:
        """Count a request with so many choices. Raises `Overloaded` where the tenant's limits do not allow it."""
        used = self.used.setdefault(tenant.name, Used())
        if tenant.concurrency is not None and used.running + choices > tenant.concurrency:
            raise Overloaded(
                f"the key of {tenant.name} may have {tenant.concurrency} answers at once (n counts); "
                f"{used.running} are under way",
                code="concurrency_limit",
                retry_after=1.0,
            )
        if rate := tenant.requests_per_minute:
            left = min(float(rate), used.left + (now - used.at) * rate / MINUTE)
            if left < 1.0:
                wait = (1.0 - left) * MINUTE / rate
                message = f"the key of {tenant.name} may send {rate} requests a minute; the next in {wait:.1f} s"
                raise Overloaded(message, code="rate_limit_exceeded", retry_after=wait)
            used.left, used.at = left - 1.0, now
        used.running += choices

    def end(self, tenant: Tenant, choices: int) -> None:
        self.used.setdefault(tenant.name, Used()).running -= choices


def budgets_within(tenants: Sequence[Tenant], budget: float | None, file: Path) -> None:
    """Raises `ConfigError` for a tenant whose budget exceeds that of the server; None: no limit."""
    for one in tenants:
        if budget is not None and one.accuracy_budget is not None and one.accuracy_budget > budget:
            raise ConfigError(
                f"the key file {file}: tenant {one.name!r} has an accuracy_budget of {one.accuracy_budget:g}, "
                f"more than --accuracy-budget {budget:g}",
                param="api_key_file",
            )
