"""A private certificate authority, and the server's certificate by it.

The authority serves one run: whoever has its certificate, which is in every
credential, knows the run's server by it, and no other.
"""

import datetime
import ipaddress
import re
from collections.abc import Sequence

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_EARLY = datetime.timedelta(days=1)  # for clocks that are slow
_DAYS = 3650
_LABEL = '[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?'
_NAME = re.compile(rf'{_LABEL}([.]{_LABEL})*')


def check_host(host: str) -> None:
  """Raises ValueError if it is no name and no address of a host."""
  if not isinstance(_host(host), x509.IPAddress) and not _NAME.fullmatch(host):
    raise ValueError(
      'hosts must be names or addresses, such as fed.example.org or 192.0.2.7;'
      f' got {host!r}'
    )


def authority(run: str) -> tuple[bytes, bytes]:
  """A new authority: its key and certificate, PEM."""
  key = ec.generate_private_key(ec.SECP256R1())
  name = _name(f'jaxfl {run}')
  usage = x509.KeyUsage(
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=True,
    encipher_only=False,
    decipher_only=False,
  )
  own = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
  certificate = (
    _builder(name, name, key)
    .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    .add_extension(usage, critical=True)
    .add_extension(own, critical=False)
    .sign(key, hashes.SHA256())
  )
  return _pem(key), certificate.public_bytes(serialization.Encoding.PEM)


def server(
  ca_key: bytes, ca: bytes, hosts: Sequence[str]
) -> tuple[bytes, bytes]:
  """A new key and certificate, PEM, of a server.

  Args:
    ca_key: key of the authority.
    ca: its certificate.
    hosts: names and addresses under which clients reach the server.
  """
  issuer_key = serialization.load_pem_private_key(ca_key, None)
  assert isinstance(issuer_key, ec.EllipticCurvePrivateKey)
  issuer = x509.load_pem_x509_certificate(ca)
  key = ec.generate_private_key(ec.SECP256R1())
  purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
  by = x509.AuthorityKeyIdentifier.from_issuer_public_key(
    issuer_key.public_key()
  )
  certificate = (
    _builder(_name('nats-server'), issuer.subject, key)
    .add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
    .add_extension(x509.SubjectAlternativeName(map(_host, hosts)), False)
    .add_extension(purpose, critical=False)
    .add_extension(by, critical=False)
    .sign(issuer_key, hashes.SHA256())
  )
  return _pem(key), certificate.public_bytes(serialization.Encoding.PEM)


def _name(text):
  return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(subject, issuer, key):
  now = datetime.datetime.now(datetime.UTC)
  return (
    x509.CertificateBuilder()
    .subject_name(subject)
    .issuer_name(issuer)
    .public_key(key.public_key())
    .serial_number(x509.random_serial_number())
    .not_valid_before(now - _EARLY)
    .not_valid_after(now + datetime.timedelta(days=_DAYS))
  )


def _host(host):
  try:
    address = ipaddress.ip_address(host)
  except ValueError:
    return x509.DNSName(host)
  return x509.IPAddress(address)


def _pem(key):
  return key.private_bytes(
    serialization.Encoding.PEM,
    serialization.PrivateFormat.PKCS8,
    serialization.NoEncryption(),
  )
