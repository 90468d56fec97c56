"""What the agent does not use is not imported, and is imported when something asks for it.

Each case is a fresh interpreter: this one has loaded everything already.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

KUBECONFIG = """
apiVersion: v1
kind: Config
current-context: a
clusters: [{name: a, cluster: {server: "http://127.0.0.1:1"}}]
users: [{name: a, user: {token: secret}}]
contexts: [{name: a, context: {cluster: a, user: a}}]
"""

LIGHTLY = "from agent.imports import lightly; lightly('agent.cli.run'); "

CONNECT = (
    LIGHTLY + "from agent.sources.kubernetes.connection import connect; connection = connect({}); "
)


def fresh(code: str, directory: Path = ROOT) -> str:
    """What a program prints."""
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=directory,
        env={"HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def kubeconfig(tmp_path: Path) -> str:
    """Arguments of `connect`."""
    path = tmp_path / "kubeconfig"
    path.write_text(KUBECONFIG)
    return repr(str(path))


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """The directory of a library `lib`, which imports `lib.tool` for a class that it calls."""
    (tmp_path / "lib").mkdir()
    files = {
        "__init__": "print('lib'); from lib import part; x = part.y",
        "part": "from lib import tool; from lib.tool import Tool; y = 2; v = 4\n"
        "def use(): return Tool(3)",
        "tool": "print('tool'); z = 1\nclass Tool:\n  def __init__(self, n): self.n = n",
    }
    for name, code in files.items():
        (tmp_path / "lib" / f"{name}.py").write_text(code)
    return tmp_path


DEFER = (
    "from agent import imports; imports.SKIPPED = {'lib': (), 'lib.tool': ('Tool',)}; "
    "imports.REEXPORTED = {('lib', 'v'): 'lib.part'}; imports.lightly('lib.part'); "
)


def test_a_skipped_module_can_be_imported_without_running(library):
    assert fresh(DEFER + "import lib.part, lib.tool; print(lib.part.y)", library) == "2"


def test_it_runs_once_when_something_of_it_is_asked_for(library):
    code = DEFER + "import lib.tool; print(lib.tool.z, lib.tool.z, hasattr(lib.tool, 'nothing'))"
    assert fresh(code, library).split() == ["tool", "1", "1", "False"]


def test_a_package_runs_for_its_names_and_not_for_its_modules(library):
    assert fresh(DEFER + "from lib import part; print(part.y)", library) == "2"
    assert fresh(DEFER + "from lib import x; print(x)", library).split() == ["lib", "2"]


def test_a_name_that_is_only_called_loads_its_module_when_it_is(library):
    code = DEFER + "import lib.part; print(lib.part.use().n, type(lib.part.use()).__name__)"
    assert fresh(code, library).split() == ["tool", "3", "Tool"]


def test_the_module_has_the_real_class_once_it_runs(library):
    code = DEFER + "import lib.tool; lib.tool.z; print(isinstance(lib.tool.Tool, type))"
    assert fresh(code, library).split() == ["tool", "True"]


def test_a_reexported_name_does_not_run_the_package(library):
    assert fresh(DEFER + "from lib import v; print(v)", library) == "4"


def test_the_code_may_use_names_that_it_has_yet_to_define(library):
    (library / "lib" / "__init__.py").write_text(
        "import sys\nme = sys.modules[__name__]\nprint(hasattr(me, 'later'))\nlater = 1"
    )
    assert fresh(DEFER + "import lib; print(lib.later)", library).split() == ["False", "1"]


def test_a_module_that_fails_runs_again_when_it_is_asked_again(library):
    (library / "lib" / "tool.py").write_text("import gone")
    code = DEFER + (
        "import lib.tool\n"
        "for _ in range(2):\n"
        "  try: lib.tool.z\n"
        "  except ModuleNotFoundError as error: print(error.name)"
    )
    assert fresh(code, library).split() == ["gone", "gone"]


def test_threads_get_the_whole_module(library):
    (library / "lib" / "tool.py").write_text("import time; time.sleep(0.2); z = 1; Tool = 2")
    code = DEFER + (
        "import lib.tool\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "with ThreadPoolExecutor(8) as pool:\n"
        "  print(*pool.map(lambda _: lib.tool.z, range(8)), sep='')"
    )
    assert fresh(code, library) == "11111111"


def test_a_library_that_does_not_bear_it_is_imported_as_usual(library):
    """As a version of it may be that derives from a class of a skipped module."""
    (library / "lib" / "part.py").write_text(
        "from lib.tool import Tool\nclass Own(Tool): pass\ny = 2\nprint('part')"
    )
    said = fresh(DEFER + "import lib; print(lib.x, lib.part.Own(5).n)", library)
    assert said.split()[-5:] == ["lib", "tool", "part", "2", "5"]


def test_a_library_without_the_module_is_imported_all_the_same(library):
    (library / "lib" / "tool.py").unlink()
    (library / "lib" / "part.py").write_text("y = 2")
    assert fresh(DEFER + "import lib; print(lib.part.y)", library) == "2"


# --- the agent ----------------------------------------------------------------------------------

UNUSED = {
    # of the Kubernetes client
    *("pydantic", "requests", "charset_normalizer", "websocket", "multiprocessing.pool"),
    *("oauthlib.oauth2.rfc6749", "kubernetes.dynamic", "kubernetes.client.models"),
    # of pyroute2, whose requests the demo and the tests use
    *("pyroute2.iproute", "pyroute2.ndb", "pyroute2.ethtool", "pyroute2.netlink.core"),
    *("unittest", "argparse"),
    # of asyncio, for structlog, and of shutil, for tempfile
    *("asyncio.base_events", "concurrent.futures", "lzma", "bz2"),
    # of structlog
    *("rich.text", "rich._null_file", "pygments"),
    # of prometheus_client
    *("http.server", "wsgiref", "gzip"),
    # for versions
    *("importlib.metadata._adapters", "zipfile", "csv"),
    # for servers that answer in protobuf, and for the API
    *("google._upb._message", "rules.decode_protobuf", "agent.serve.api", "rules.explain"),
    # of the demo and of other commands
    *("lab.world", "agent.sources.manifests.follower", "nftables", "inotify_simple"),
}
"""Parts of the libraries and of the project that the agent does not need."""

START = LIGHTLY + (
    "import agent.run; from agent.config.file import merged; "
    "settings = merged(None, {}); log = agent.run.log.configure(); "
    "metrics = agent.run.Metrics(agent.run.__version__); "
    "served = agent.run._Served(agent.run.Reports(metrics), agent.run._Following(), ()); "
    "put = lambda events: None; "
    "agent.run._source((), settings, put, log, served, failed=print, start=print); "
    "log.info('started'); print(*sys.modules)"
)
"""What `run` does until it sends its first request, but for the kernel."""


@pytest.mark.parametrize("credentials", ["kubeconfig", "server"])
def test_a_start_loads_nothing_that_is_not_used(credentials, tmp_path):
    (tmp_path / "kubeconfig").write_text(KUBECONFIG)
    given = {"server": "http://127.0.0.1:1", "kubeconfig": str(tmp_path / "kubeconfig")}
    settings = {"node": "node-1", credentials: given[credentials]}
    loaded = set(fresh(START.replace("{}", repr(settings))).split())
    assert {"kubernetes.client.rest", "structlog", "prometheus_client.core"} <= loaded
    assert sorted(UNUSED & loaded) == []
    assert ("yaml" in loaded) == (credentials == "kubeconfig")


def test_a_traceback_for_people_finds_rich():
    code = (
        LIGHTLY + "import structlog, io\n"
        "text = io.StringIO()\n"
        "try: 1 / 0\n"
        "except ArithmeticError: structlog.dev.rich_traceback(text, sys.exc_info())\n"
        "print('ZeroDivisionError' in text.getvalue(), 'rich.text' in sys.modules)"
    )
    assert fresh(code).split() == ["True", "True"]


def test_the_rest_of_the_client_is_there_for_who_wants_it(kubeconfig):
    code = CONNECT.format(kubeconfig) + (
        "import kubernetes; from kubernetes import client, config; "
        "print(client.CoreV1Api().api_client.__class__ is client.ApiClient, "
        "config.load_kube_config.__name__, kubernetes.watch.Watch.__name__)"
    )
    assert fresh(code).split() == ["True", "load_kube_config", "Watch"]


def test_a_kubeconfig_that_refreshes_tokens_finds_what_it_needs(kubeconfig):
    """What `kube_config` calls for the auth provider oidc, with the exception that it expects."""
    code = CONNECT.format(kubeconfig) + (
        "from kubernetes.config import kube_config as k; "
        "print(type(k.OAuth2Session(client_id='a')).__name__, type(k.ApiClient()).__name__, "
        "k.oauthlib.oauth2.rfc6749.errors.InvalidClientIdError.__name__)"
    )
    assert fresh(code).split() == ["OAuth2Session", "ApiClient", "InvalidClientIdError"]
