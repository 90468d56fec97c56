"""What the agent does not use is not loaded, and comes when it is asked for.

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

CONNECT = "from agent.sources.kubernetes.follower import connect; connection = connect({}); "


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
        "part": "from lib import tool; from lib.tool import Tool; y = 2\ndef use(): return Tool(3)",
        "tool": "print('tool'); z = 1\nclass Tool:\n  def __init__(self, n): self.n = n",
    }
    for name, code in files.items():
        (tmp_path / "lib" / f"{name}.py").write_text(code)
    return tmp_path


DEFER = "from agent.deferred import load; load(['lib.part'], {'lib': (), 'lib.tool': ('Tool',)}); "


def test_a_deferred_module_is_there_without_having_run(library):
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


def test_others_get_the_real_class_from_the_module(library):
    code = DEFER + "from lib.tool import Tool; print(isinstance(Tool, type))"
    assert fresh(code, library).split() == ["tool", "True"]


def test_what_cannot_be_deferred_is_imported_as_usual(library):
    (library / "lib" / "part.py").write_text(
        "from lib.tool import Tool\nclass Own(Tool): pass\ny = 2\nprint('part')"
    )
    said = fresh(DEFER + "import lib; print(lib.x, lib.part.Own(5).n)", library)
    assert said.split() == ["lib", "tool", "part", "2", "5"]


def test_a_library_without_what_is_to_be_deferred_is_imported_as_usual(library):
    code = "from agent.deferred import load; load(['lib.part'], {'lib': (), 'lib.gone': ()}); "
    assert fresh(code + "import lib; print(lib.x)", library).split() == ["lib", "tool", "2"]


# --- the agent ----------------------------------------------------------------------------------

UNUSED = {
    # of the Kubernetes client
    *("pydantic", "requests", "charset_normalizer", "websocket", "multiprocessing.pool"),
    *("oauthlib.oauth2.rfc6749", "kubernetes.dynamic", "kubernetes.client.models"),
    # of pyroute2
    *("pyroute2.ndb.main", "pyroute2.iproute.bsd", "pyroute2.ethtool", "pyroute2.wiset", "sqlite3"),
    # of structlog
    *("rich.text", "rich._null_file", "pygments"),
    # of prometheus_client
    *("http.server", "wsgiref", "gzip"),
    # for versions
    *("importlib.metadata._adapters", "zipfile", "csv"),
    # of the demo and of other commands
    *("lab.world", "agent.sources.manifests.follower", "nftables", "inotify_simple"),
}
"""What comes with the libraries that the agent imports, or with the project, and is not needed."""

START = (
    "import agent.cli.main, agent.kernel.tables, agent.run; from agent.config.file import merged; "
    "settings = merged(None, {}); log = agent.run.log.configure(); "
    "metrics = agent.run.Metrics(agent.run.__version__); "
    "agent.run._source((), settings, print, log, metrics); "
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
        "import agent.log, structlog, io\n"
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
