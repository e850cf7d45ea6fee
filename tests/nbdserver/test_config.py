"""The configuration file."""

from pathlib import Path

import pytest

from nbdserver.access import Access, ExportRules, Who
from nbdserver.config import CONFIG_BYTES_MAX, SERVER_BOUNDS, Config, ConfigError, VdiConfig, load
from nbdserver.server import ServerSettings
from nbdserver.tls import TlsSettings
from objstore.units import GIB, KIB, MIB
from objstore.volume.settings import StoreSettings


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "sheepfold.toml"
    path.write_text(text)
    return path


def test_everything_that_can_be_said(tmp_path: Path) -> None:
    text = """
zones = ["a", "/srv/b"]
listen = ["unix:///run/x.sock"]
default = "disk"
control = "control.sock"

[vdi.disk]
size = "1.5G"
copies = 2
mode = "unsafe"
prealloc = true

[vdi."Datenträger 1"]
size = 4097

[store]
dirty_bytes_max = "32M"
dirty_age_seconds = 2
segment_bytes = 1048576
map_memory_bytes = "16M"

[server]
connections_max = 5
buffer_bytes_max = "1G"
extended_headers = false

[tls]
mode = "selective"
certificates = "tls"
verify_clients = false

[access.disk]
write = [{ certificate = "web" }, { uid = 0 }]
read = [{ address = "10.0.0.0/8" }]
see = [{ anyone = true }]
tls = true
connections_max = 8
one_writer = true

[access."disk@t1"]

[access."*"]
read = []
"""
    assert load(write(tmp_path, text)) == Config(
        zones=(tmp_path / "a", Path("/srv/b")),
        listen=("unix:///run/x.sock",),
        default="disk",
        control=tmp_path / "control.sock",
        vdi={
            "disk": VdiConfig(GIB + 512 * MIB, copies=2, mode="unsafe", prealloc=True),
            "Datenträger 1": VdiConfig(4 * KIB + 1),
        },
        store=StoreSettings(
            dirty_bytes_max=32 * MIB, dirty_age_seconds=2.0, segment_bytes=MIB, map_memory_bytes=16 * MIB
        ),
        server=ServerSettings(connections_max=5, buffer_bytes_max=GIB, extended_headers=False),
        tls=TlsSettings("selective", tmp_path / "tls", verify_clients=False),
        access=Access(
            {
                "disk": ExportRules(
                    write=[Who(certificate="web"), Who(uid=0)],
                    read=[Who(address="10.0.0.0/8")],
                    see=[Who(anyone=True)],
                    tls=True,
                    connections_max=8,
                    one_writer=True,
                ),
                "disk@t1": ExportRules(),
                "*": ExportRules(read=[]),
            }
        ),
    )


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    assert load(write(tmp_path, "")) == Config()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("zone = []", "unknown key zone; the nearest valid one is zones"),
        ("stor = 1", "unknown key stor; the nearest valid one is store"),
        ("[serve]", "unknown key serve; the nearest valid one is server"),
        ("[store]\ndirty_bytes = 1", "unknown key store.dirty_bytes; the nearest valid one is store.dirty_bytes_max"),
        ("[server]\nqqq = 1", "unknown key server.qqq; the nearest valid one is server."),
        ("[server]\nlinger_seconds = 1", "unknown key server.linger_seconds"),
        ("[vdi.a]\nsize = 1\nkopies = 1", "unknown key vdi.a.kopies; the nearest valid one is vdi.a.copies"),
        ("[vdi.a]", "vdi.a: Object missing required field `size`"),
        ("[vdi.a]\nsize = '10X'", "vdi.a.size: size '10X'"),
        ("[vdi.a]\nsize = 0", "vdi.a: a VDI of 0 bytes"),
        ("[vdi.a]\nsize = 1.5", "vdi.a.size: Expected `int`, got `float`"),
        ("[vdi.a]\nsize = 1\ncopies = 0", "vdi.a: copies = 0"),
        ("[vdi.a]\nsize = 1\nmode = 'fast'", "vdi.a: mode 'fast'"),
        ("[vdi.'a/b']\nsize = 1", "'a/b'"),
        ("[vdi]\na = 1", "vdi.a must be a table"),
        ("vdi = 1", "vdi must be a table"),
        ("store = 'x'", "store must be a table"),
        ("zones = 'a'", "zones: Expected `array`, got `str`"),
        ("zones = ['a', 1]", "zones[1]: Expected `str`"),
        ("[store]\nsegment_bytes = true", "store.segment_bytes: Expected `int`, got `bool`"),
        ("[store]\ndirty_bytes_max = '1K'", "store: dirty_bytes_max = 1024 is out of range"),
        ("[store]\ndirty_age_seconds = nan", "store: dirty_age_seconds = nan"),
        ("[server]\nconnections_max = 0", "server: connections_max = 0 is out of range: 1 to 65536"),
        ("[server]\nextended_headers = 1", "server.extended_headers: Expected `bool`"),
        ("[tls]\nmode = 'on'", "tls: mode = 'on' is not possible; off, selective, forced are"),
        ("[tls]\nmode = 'forced'", "tls: mode = forced needs certificates"),
        ("[tls]\ncertificate = '/x'", "unknown key tls.certificate; the nearest valid one is tls.certificates"),
        ("[tls]\ncertificates = 1", "tls.certificates: Expected `Path`, got `int`"),
        ("[tls]\npsk = 'keys'", "tls: psk = "),
        ("[access]\ndisk = 1", "access.disk must be a table: [access.disk]"),
        ("access = 1", "access must be a table"),
        ("[access.'a/b']", "name in [access] 'a/b'"),
        ("[access.'a@']", "a tag in [access] must not be empty"),
        ("[access.a]\nwriters = []", "unknown key access.a.writers; the nearest valid one is access.a."),
        ("[access.a]\nwrite = 'web'", "access.a.write must be a list of tables"),
        ("[access.a]\nwrite = ['web']", "access.a.write[0] must be a table"),
        ("[access.a]\nwrite = [{ certificat = 'x' }]", "unknown key access.a.write[0].certificat; the nearest"),
        ("[access.a]\nread = [{ uid = 1 }, {}]", "access.a.read[1]: give one or more of"),
        ("[access.a]\nread = [{ address = '10.0.0.1/8' }]", "access.a.read[0]: address = '10.0.0.1/8': "),
        ("[access.a]\nread = [{ uid = 'root' }]", "access.a.read[0].uid: Expected `int"),
        ("[access.a]\nconnections_max = -1", "access.a: connections_max = -1"),
        ("[access.a]\none_writer = 1", "access.a.one_writer: Expected `bool`"),
        ("zones = [1 2]", "line 1"),
        ("default = 'a'\ndefault = 'b'\nzones = []", "line 2"),
        ("zones = " + "[" * 5000, "nested too deeply"),
    ],
)
def test_mistakes_are_named_in_one_line(tmp_path: Path, text: str, named: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    message = str(caught.value)
    assert named in message
    assert str(path) in message
    assert "\n" not in message


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml: No such file"):
        load(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load(tmp_path)
    path = tmp_path / "latin1.toml"
    path.write_bytes(b"default = '\xe4'")
    with pytest.raises(ConfigError, match="not UTF-8 at byte 11"):
        load(path)
    path.write_bytes(b"#" * (CONFIG_BYTES_MAX + 1))
    with pytest.raises(ConfigError, match="larger than"):
        load(path)


def test_the_servers_defaults_are_inside_their_own_bounds() -> None:
    defaults = ServerSettings()
    for key, (lowest, highest) in SERVER_BOUNDS.items():
        assert lowest <= getattr(defaults, key) <= highest
