#!/usr/bin/env bash
# Sets gpumon up and runs it: see ./setup.sh --help.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

VENV=.venv

usage() {
    cat <<'TEXT'
Usage: ./setup.sh VERB [options]

  run    set up what is missing and serve the dashboard on http://127.0.0.1:8081,
         in the foreground; Ctrl-C ends it
  demo   the same on simulated GPUs
  test   set up and run everything that checks this tree
  clean  remove what the other verbs installed (.venv and caches; never the history)

In a container, with Docker Compose (see docs/deployment.md):

  start    start it in the background, built first where there is no image yet
  stop     stop it; history/ and logs/ stay
  restart  start it anew, with the image and the settings of now
  status   say whether it runs and is healthy
  logs     show its log and follow it; Ctrl-C ends that
  build    build the image anew, on the newest base image

./gpumon is the command line, once run or test has set it up: see ./gpumon --help.

Options after run or demo go to Streamlit, such as --server.port 9000 or
--server.address 0.0.0.0; options after the verbs of Compose go to Compose.
Settings are GPUMON_* variables, also read from a file named .env: see docs/settings.md.
TEXT
}

fail() {
    echo "setup.sh: $*" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python3.14; do
        if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    if command -v python3 >/dev/null; then
        fail "gpumon needs Python 3.11 or newer, and $(python3 --version 2>&1) is all there is; install a newer python3."
    fi
    fail "python3 is not installed; on Debian and Ubuntu: sudo apt-get install python3 python3-venv"
}

# install FILE: make .venv hold what FILE locks, checked by its hashes; a second time it does nothing.
install() {
    local python stamp
    if [ ! -x "$VENV/bin/python" ] || ! "$VENV/bin/python" -c '' 2>/dev/null; then
        python=$(find_python)
        "$python" -c 'import venv, ensurepip' 2>/dev/null ||
            fail "Python's venv module is missing; on Debian and Ubuntu: sudo apt-get install python3-venv"
        echo "setup.sh: making $VENV with $("$python" --version)"
        rm -rf "$VENV"
        "$python" -m venv "$VENV" || fail "$VENV could not be made; see the lines above."
    fi
    stamp=$VENV/.installed-$1-$(cat requirements*.txt | cksum | tr -d ' ')
    if [ ! -e "$stamp" ]; then
        echo "setup.sh: installing $1"
        "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes -r "$1" ||
            fail "the packages of $1 could not be installed; see the lines above. Is the network reachable?"
        rm -f "$VENV"/.installed-"$1"-*
        touch "$stamp"
    fi
}

# The port and address that Streamlit will use, from its options, environment and config.toml.
check_port() {
    "$VENV/bin/python" - "$@" <<'PYTHON' || exit 1
import os, socket, sys, tomllib

server = tomllib.load(open(".streamlit/config.toml", "rb"))["server"]
found = {}
for name in ("port", "address"):
    found[name] = os.environ.get(f"STREAMLIT_SERVER_{name.upper()}", server[name])
    for position, option in enumerate(sys.argv[1:], 1):
        key, _, value = option.partition("=")
        if key == f"--server.{name}":
            found[name] = value or (sys.argv[position + 1] if position + 1 < len(sys.argv) else "")
try:
    port = int(found["port"])
    family = socket.AF_INET6 if ":" in found["address"] else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((found["address"], port))
except (ValueError, OverflowError):
    sys.exit(f"setup.sh: {found['port']!r} is not a port; use a number from 1 to 65535.")
except OSError as error:
    sys.exit(
        f"setup.sh: {found['address']}:{port} cannot be served ({error.strerror}); stop the program that "
        "uses it, or choose another with --server.port."
    )
PYTHON
}

serve() {
    install requirements.txt
    check_port "$@"
    exec "$VENV/bin/streamlit" run app.py "$@"
}

# have COMMAND: whether it is on the PATH, or in the folder where Debian installs the programs of a PostgreSQL server.
have() {
    command -v "$1" >/dev/null || compgen -G "/usr/lib/postgresql/*/bin/$1" >/dev/null
}

# need COMMAND PACKAGE [SERVICE]: install a program that the tests use, where that is allowed. A service of the package
# is stopped, now and for the next boot, and recommended packages are left out.
need() {
    have "$1" && return
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "setup.sh: installing $2"
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq ${3:+--no-install-recommends} "$2"; } >/dev/null ||
            echo "setup.sh: $2 could not be installed" >&2
        [ -z "${3:-}" ] || silence "$3"
    fi
    if ! have "$1"; then
        [ "${CI:-}" != true ] || fail "$1 is missing, and CI may skip nothing; install $2."
        echo "setup.sh: $1 is missing, so the tests that need it are skipped; to run them: sudo apt-get install $2" >&2
    fi
}

# silence SERVICE: stop it, and do not let it start by itself.
silence() {
    if [ -d /run/systemd/system ]; then
        systemctl disable --quiet --now "$1" || true
    elif [ -x "/etc/init.d/$1" ]; then
        { "/etc/init.d/$1" stop && update-rc.d "$1" disable; } >/dev/null 2>&1 || true
    fi
}

check() {
    install requirements-dev.txt
    need chromium chromium
    need gcc gcc
    # The tests start servers of their own, and do not use the one that Debian's package may start.
    need initdb postgresql
    need systemd-analyze systemd
    need shellcheck shellcheck
    need promtool prometheus prometheus
    need faketime faketime
    need openssl openssl
    local bin=$VENV/bin
    "$bin/ruff" format --check .
    "$bin/ruff" check .
    "$bin/mypy"
    # More than there are cores: many tests wait for the next tick. Whole files: their tests share servers.
    exec "$bin/python" -m pytest -n 4 --dist loadfile --no-loadscope-reorder "$@"
}

# need_docker: say in one sentence what is missing for a running engine.
need_docker() {
    local version problem
    command -v docker >/dev/null ||
        fail "Docker is not installed; see https://docs.docker.com/engine/install, or use ./setup.sh run, which needs none."
    version=$(docker compose version --short 2>/dev/null) ||
        fail "Docker Compose is missing; on Debian and Ubuntu: sudo apt-get install docker-compose-plugin (docker-compose-v2 in Ubuntu's own packages)."
    # Compose 2.24 is the first version that accepts a missing .env.
    version=${version#v}
    [ "$(printf '%s\n' 2.24 "$version" | sort -V | head -n 1)" = 2.24 ] ||
        fail "Docker Compose 2.24 or newer is needed, and this is $version; update the package that brought it."
    if ! problem=$(docker info --format '{{.ServerVersion}}' 2>&1 >/dev/null); then
        case $problem in
            *"permission denied"*)
                fail "this user may not talk to Docker; use sudo ./setup.sh $verb, or: sudo usermod -aG docker $(id -un), and log in again."
                ;;
            *) fail "Docker's engine does not answer; start it with: sudo systemctl start docker" ;;
        esac
    fi
}

# Docker Desktop has NVIDIA's runtime inside its own virtual machine, where this script cannot see it.
need_nvidia() {
    local engine
    engine=$(docker info --format '{{.OperatingSystem}} {{json .Runtimes}}')
    case $engine in *"Docker Desktop"* | *nvidia*) return ;; esac
    command -v nvidia-container-runtime-hook >/dev/null ||
        fail "the NVIDIA Container Toolkit is missing, so no container can see a GPU; install the package nvidia-container-toolkit, then: sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker"
}

# The container runs as the owner of history/, so that no file in it belongs to root by surprise.
prepare_folders() {
    local folder
    for folder in history logs; do
        [ ! -d "$folder" ] || continue
        mkdir -m 700 "$folder"
        [ -z "${SUDO_UID:-}" ] || chown "$SUDO_UID:${SUDO_GID:-$SUDO_UID}" "$folder"
    done
    if [[ $(docker info --format '{{.SecurityOptions}}') == *rootless* ]]; then
        # In a rootless engine, root is the user who runs it.
        export PUID=0 PGID=0
    else
        export PUID=${PUID:-$(stat -c %u history)} PGID=${PGID:-$(stat -c %g history)}
    fi
}

# up [OPTION...]: make the container match docker-compose.yml and .env.
up() {
    need_docker
    need_nvidia
    prepare_folders
    docker compose up --detach "$@"
    echo "setup.sh: gpumon starts; ./setup.sh status says when it is healthy, ./setup.sh logs what it does"
}

compose() {
    need_docker
    exec docker compose "$@"
}

verb=${1:---help}
[ $# -eq 0 ] || shift
case $verb in
    run) serve "$@" ;;
    demo)
        export GPUMON_SOURCE=demo
        serve "$@"
        ;;
    test) check "$@" ;;
    clean) rm -rf "$VENV" .pytest_cache .mypy_cache .ruff_cache tests/fake_nvml/build artifacts ;;
    start) up "$@" ;;
    # Compose's own restart would use the old image and the old settings.
    restart) up --force-recreate "$@" ;;
    stop) compose stop "$@" ;;
    status) compose ps --all "$@" ;;
    logs) compose logs --follow --tail 200 "$@" ;;
    build) compose build --pull "$@" ;;
    -h | --help | help) usage ;;
    *) fail "there is no verb '$verb'; ./setup.sh --help lists them." ;;
esac
