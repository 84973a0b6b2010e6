"""The certificate of the server, if it speaks HTTPS itself."""

import ssl

from dilaserve.config import ServerConfig
from dilaserve.errors import ConfigError


def context(server: ServerConfig) -> ssl.SSLContext | None:
    """None without --ssl-certfile. Raises `ConfigError` for a certificate or key that cannot be used."""
    if server.ssl_certfile is None:
        if server.ssl_keyfile is not None:
            raise ConfigError("--ssl-keyfile needs --ssl-certfile", param="ssl_certfile")
        return None
    made = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    load(made, server)
    return made


def load(context: ssl.SSLContext, server: ServerConfig) -> None:
    """Read the certificate, again if need be: connections that are open keep the one that they began with."""
    certificate, key = server.ssl_certfile, server.ssl_keyfile
    try:
        context.load_cert_chain(certificate or "", key)
    except (OSError, ssl.SSLError) as error:
        what = f"{certificate}" + (f" with the key {key}" if key else "")
        raise ConfigError(
            f"cannot use the certificate {what}: {error.strerror or error}", param="ssl_certfile"
        ) from error
