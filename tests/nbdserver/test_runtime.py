"""Where sockets live by default."""

from pathlib import Path

import pytest

from nbdserver.runtime import control_path, make_runtime_directory, runtime_directory
from objstore.errors import InvalidRequest


@pytest.mark.parametrize(
    ("environ", "uid", "directory"),
    [
        ({"RUNTIME_DIRECTORY": "/run/flock:/run/other", "XDG_RUNTIME_DIR": "/run/user/5"}, 5, "/run/flock"),
        ({"XDG_RUNTIME_DIR": "/run/user/5"}, 5, "/run/user/5/sheepfold"),
        ({"XDG_RUNTIME_DIR": ""}, 5, "/tmp/sheepfold-5"),
        ({}, 0, "/run/sheepfold"),
    ],
)
def test_the_first_place_that_applies(environ: dict[str, str], uid: int, directory: str) -> None:
    assert runtime_directory(environ, uid) == Path(directory)


def test_made_for_this_user_and_found_again(tmp_path: Path) -> None:
    directory = tmp_path / "sheepfold"
    make_runtime_directory(directory)
    make_runtime_directory(directory)
    assert directory.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("trap", ["link", "file", "writable", "no parent"])
def test_a_directory_that_others_control_is_refused(tmp_path: Path, trap: str) -> None:
    directory = tmp_path / "sheepfold"
    if trap == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        directory.symlink_to(tmp_path / "elsewhere")
    elif trap == "file":
        directory.write_text("")
    elif trap == "writable":
        directory.mkdir()
        directory.chmod(0o777)
    else:
        directory = directory / "deeper"
    with pytest.raises(InvalidRequest) as caught:
        make_runtime_directory(directory)
    assert str(directory) in str(caught.value)
    assert "--listen" in str(caught.value)


def test_each_store_has_its_own_control_socket_the_same_at_every_start(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert control_path(tmp_path, tmp_path / "a") == control_path(tmp_path, tmp_path / "link")
    assert control_path(tmp_path, tmp_path / "a") != control_path(tmp_path, tmp_path / "b")
