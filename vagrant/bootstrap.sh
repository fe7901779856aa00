#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Makes a checkout ready to build, test and run: installs the Debian packages that are missing,
# and keeps .venv in step with pyproject.toml and native/. Does nothing, quickly, when all is there.
#
#     vagrant/bootstrap.sh [PACKAGE-LIST]...      the default list is vagrant/packages.txt
#
# BLOCKSNAP_WHEELHOUSE names a directory of wheels to install from instead of the package index.
set -euo pipefail

PROJECT=$(dirname "$(dirname "$(readlink -f "$0")")")
VENV=$PROJECT/.venv
STAMP=$VENV/.blocksnap-stamp

say() {
    printf 'bootstrap: %s\n' "$*" >&2
}

die() {
    say "$@"
    exit 1
}

missing_packages() {
    local wanted
    wanted=$(sed 's/#.*//' "$@" | tr -s '[:space:]' '\n' | sed '/^$/d' | sort -u)
    # dpkg-query fails when it does not know one of them, and that is the answer we want.
    # shellcheck disable=SC2016,SC2086
    { dpkg-query -W -f '${db:Status-Status} ${Package}\n' $wanted 2> /dev/null || true; } |
        sed -n 's/^installed //p' | sort -u | comm -13 - <(echo "$wanted")
}

# Packages must not start daemons here, nor make a database cluster on the machine's own disks.
# What is put in their way is ours alone, and gone afterwards.
hold_services() {
    local policy=/usr/sbin/policy-rc.d cluster=/etc/postgresql-common/createcluster.d
    if [ ! -e $policy ]; then
        printf '#!/bin/sh\nexit 101\n' > $policy
        chmod 755 $policy
        HELD+=("$policy")
    fi
    mkdir -p $cluster
    echo 'create_main_cluster = false' > $cluster/blocksnap-bootstrap.conf
    HELD+=("$cluster/blocksnap-bootstrap.conf")
}

# What comes from elsewhere does not always come at once.
again() {
    local attempt
    for attempt in 1 2 3; do
        if "$@"; then
            return
        fi
        say "$1 failed (attempt $attempt of 3)"
        [ "$attempt" = 3 ] || sleep $((attempt * 10))
    done
    return 1
}

fetch_packages() {
    export DEBIAN_FRONTEND=noninteractive
    apt-get -o DPkg::Lock::Timeout=600 update -qq &&
        apt-get -o DPkg::Lock::Timeout=600 install -qq -y --no-install-recommends -o Dpkg::Use-Pty=0 \
            -o Dpkg::Options::=--force-confold "$@" > /dev/null
}

install_packages() {
    [ "$(id -u)" = 0 ] || die "these packages are missing, and only root can install them: $*"
    say "installing $*"
    HELD=()
    trap 'rm -f "${HELD[@]}"' EXIT
    hold_services
    again fetch_packages "$@"
    rm -f "${HELD[@]}"
    trap - EXIT
}

ensure_packages() {
    local missing
    if ! command -v dpkg-query > /dev/null; then
        say "not a Debian system: see vagrant/packages.txt for what has to be installed"
        return
    fi
    missing=$(missing_packages "$@")
    # shellcheck disable=SC2086
    [ -z "$missing" ] || install_packages $missing
}

new_enough() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2> /dev/null
}

base_python() {
    local candidate
    for candidate in /usr/bin/python3 python3 python3.14 python3.13 python3.12 python3.11; do
        if command -v "$candidate" > /dev/null && new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    die "no Python 3.11 or newer with the venv module"
}

# Everything that the installed package is made from, save the Python files, which are used in place.
fingerprint() {
    (cd "$PROJECT" && find native pyproject.toml vagrant/bootstrap.sh blocksnap/__init__.py -type f \
        ! -path '*/corpus/*' -print0 | sort -z | xargs -0 sha256sum | sha256sum)
}

healthy() {
    "$VENV/bin/python" -c 'import blocksnap._native, pytest' 2> /dev/null
}

ensure_venv() {
    local wanted requires source=()
    wanted=$(fingerprint)
    if [ "$(cat "$STAMP" 2> /dev/null)" = "$wanted" ] && healthy; then
        return
    fi
    if ! "$VENV/bin/python" -m pip --version > /dev/null 2>&1 || ! new_enough "$VENV/bin/python"; then
        rm -rf "$VENV"
        say "creating .venv with $(base_python)"
        "$(base_python)" -m venv "$VENV"
    fi
    if [ -n "${BLOCKSNAP_WHEELHOUSE-}" ]; then
        export PIP_NO_INDEX=1 PIP_FIND_LINKS=$BLOCKSNAP_WHEELHOUSE
    fi
    say "building the C core and installing blocksnap into .venv"
    rm -f "$STAMP"
    # The build backend is installed rather than isolated, so that a rebuild takes seconds.
    requires=$("$VENV/bin/python" -c 'import sys, tomllib
print(*tomllib.load(open(sys.argv[1], "rb"))["build-system"]["requires"], sep="\n")' \
        "$PROJECT/pyproject.toml")
    mapfile -t source <<< "$requires"
    again "$VENV/bin/python" -m pip install -qq "${source[@]}"
    again "$VENV/bin/python" -m pip install -qq --no-build-isolation -e "${PROJECT}[dev]"
    healthy || die "the package was installed but does not import"
    echo "$wanted" > "$STAMP"
}

lists=("$@")
[ $# -gt 0 ] || lists=("$PROJECT/vagrant/packages.txt")
mkdir -p "$PROJECT/build"
exec 9> "$PROJECT/build/bootstrap.lock"
flock 9
ensure_packages "${lists[@]}"
ensure_venv
