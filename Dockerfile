# The image of sliceproxy's agent: an interpreter, the agent, and nothing to log in to.
#
#   docker build --tag sliceproxy:0.2.0 .
#
# Three stages. `packages` installs from Debian and from requirements.lock, `tree` picks what the
# agent needs into a root directory of its own, and the last stage is that directory alone: no
# shell, no package manager, no setuid file.
#
# 60.1 MB (amd64): the interpreter with its library 18, shared libraries 16, the agent 2, what it
# imports 24. protobuf costs 4 of them, most of it the C++ library. The stage `packages`, before
# anything is left out, has 490 MB.
#
# Behind a company's mirror, whose certificate only the company knows:
#
#   docker build --build-arg INDEX=https://mirror.example/pypi/simple \
#       --build-arg SOURCES='deb https://mirror.example/debian trixie main' \
#       --build-arg CERTIFICATES="$(cat company-ca.pem)" .
#
# These arguments are seen by the first stages only and leave no trace in the image. Still, give no
# password in them: the build cache of the engine keeps them.
#
# Reproducible: requirements.lock pins every Python package with its hashes (its head says how to
# update it). What Debian contributes is as old as the base image and the mirror; to fix that and
# the time in the SBOM, too, give all three:
#
#   docker build --build-arg BASE=debian:trixie-slim@sha256:... \
#       --build-arg SOURCES='deb [check-valid-until=no] SNAPSHOT-URL trixie main' \
#       --build-arg SOURCE_DATE_EPOCH=$(git log -1 --format=%ct) .
#
# The digest of the day, to renew it with each release (a release should pin it):
#
#   docker buildx imagetools inspect debian:trixie-slim --format '{{.Manifest.Digest}}'
#
# Other architectures: `docker buildx build --platform linux/arm64 .`. Nothing here names one, and
# all wheels of the lock exist for arm64 (tests/container/test_wheels.py); the image itself was built
# and run on amd64 only.
#
# Inside, for scanners of vulnerabilities and for people: /usr/share/sliceproxy/sbom.spdx.json (SPDX
# 2.3), /usr/share/sliceproxy/versions, /var/lib/dpkg/status.d and the packages' dist-info.

ARG BASE=debian:trixie-slim

# --- all packages ---------------------------------------------------------------------------------

FROM ${BASE} AS packages
# The lines of an apt sources list, say of a snapshot; empty: the base image's own.
ARG SOURCES=
# Certificate authorities to trust beyond Debian's, in PEM, one after the other.
ARG CERTIFICATES=
# update-ca-certificates, which Debian's pip depends on, takes one certificate a file. apt needs them
# before that; for https it has no other ones in this base image.
RUN set -eu; \
    if [ -n "$SOURCES" ]; then \
        rm -rf /etc/apt/sources.list /etc/apt/sources.list.d/*; \
        printf '%s\n' "$SOURCES" >/etc/apt/sources.list; \
    fi; \
    if [ -n "$CERTIFICATES" ]; then \
        mkdir -p /usr/local/share/ca-certificates; \
        cd /usr/local/share/ca-certificates; \
        printf '%s\n' "$CERTIFICATES" | awk \
            '/-BEGIN CERTIFICATE-/ { file = "build-" ++n ".crt" } file { print >file }'; \
        [ -e build-1.crt ] || { echo "CERTIFICATES has no certificate in PEM" >&2; exit 1; }; \
        if [ ! -e /etc/ssl/certs/ca-certificates.crt ]; then \
            cat build-*.crt >/etc/apt/build-certificates; \
            echo 'Acquire::https::CaInfo "/etc/apt/build-certificates";' \
                >/etc/apt/apt.conf.d/build-certificates; \
        fi; \
    fi; \
    apt-get update -q \
    && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends \
        python3 python3-pip python3-setuptools

# The dependencies first: this layer is built again only when the lock changes. Wheels only, so no
# build script of another project runs here, and no compiler is needed.
COPY requirements.lock /build/
# The package index; empty: PyPI.
ARG INDEX=
RUN ${INDEX:+env PIP_INDEX_URL="$INDEX"} python3 -m pip install --no-cache-dir --no-compile --disable-pip-version-check \
        --root-user-action=ignore --require-hashes --no-deps --only-binary :all: \
        --target /site -r /build/requirements.lock

# The agent itself, built with Debian's setuptools so that nothing unpinned is fetched for it.
# .dockerignore says what the project's package is made of.
COPY . /build/
RUN python3 -m pip install --no-cache-dir --no-compile --disable-pip-version-check \
        --root-user-action=ignore --no-deps --no-build-isolation --no-index \
        --target /own /build

# --- the files the agent needs --------------------------------------------------------------------

FROM packages AS tree
# Never imported by the agent: the client's generated models and asyncio twin (125 MB; the agent
# decodes what it needs itself), what only that twin uses, the lexers of a syntax highlighter, and
# parts of the standard library that need a terminal, a screen or a compiler, or encode East Asian
# text other than as Unicode. tests/container runs the agent without them.
RUN set -eu; \
    cd /site; \
    rm -rf bin kubernetes/aio aiohttp* aiosignal* aiohappyeyeballs* frozenlist* multidict* \
        propcache* yarl* attr attrs* tzdata* nftables* oxl_libnftables*; \
    find pygments/lexers -name '*.py' ! -name __init__.py ! -name _mapping.py -delete; \
    find . -type f ! -name '*.so*' -exec chmod a-x {} +; \
    find kubernetes/client/models kubernetes/client/api -name '*.py' ! -name __init__.py -delete; \
    mv /own/sliceproxy*.dist-info .; \
    mkdir -p /root-tree/usr/bin /root-tree/usr/lib /root-tree/usr/local/bin /root-tree/etc; \
    python=python$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
    cp /usr/bin/$python /root-tree/usr/bin/python3; \
    cp -r /usr/lib/$python /root-tree/usr/lib/; \
    cd /root-tree/usr/lib/$python; \
    rm -rf test idlelib tkinter turtledemo turtle.py ensurepip venv pydoc_data lib2to3 config-* \
        curses dbm site-packages sitecustomize.py; \
    find . -name __pycache__ -prune -exec rm -rf {} +; \
    cd lib-dynload; \
    rm -f _curses* readline* _dbm* _gdbm* _tkinter* _test* _xxtest* _ctypes_test* xx* \
        _codecs_* _multibytecodec*; \
    cd /root-tree/usr/local; \
    mkdir -p lib/$python; \
    cp -r /site lib/$python/dist-packages; \
    printf '#!/usr/bin/python3 -I\nfrom agent.cli.main import main\n\nmain()\n' >bin/sliceproxy; \
    chmod 755 bin/sliceproxy

# Bytecode is made here, for the root file system is read-only where the agent runs. What is not
# ours keeps only its bytecode (a traceback still names file and line); ours keeps its source, too.
# Hashes in place of times keep the layer the same from build to build.
RUN set -eu; \
    compile() { \
        python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash \
            -s /root-tree -p / "$@"; \
    }; \
    compile -b /root-tree/usr/lib /root-tree/usr/local/lib; \
    find /root-tree/usr -name '*.py' -delete; \
    find /root-tree/usr -name '*.pyi' -delete; \
    cp -r /own/agent /own/rules /root-tree/usr/local/lib/python3.*/dist-packages/; \
    compile /root-tree/usr/local/lib/python3.*/dist-packages/agent \
        /root-tree/usr/local/lib/python3.*/dist-packages/rules

# The shared libraries that all this names, the loader, what the C library reads to look up names
# (an API server may have one), and who made all of it.
RUN set -eu; \
    cd /root-tree; \
    ln -s usr/lib lib; \
    [ ! -d /lib64 ] || { mkdir usr/lib64; ln -s usr/lib64 lib64; }; \
    find usr -type f \( -name '*.so*' -o -path usr/bin/python3 \) -exec ldd {} + 2>/dev/null \
        | sed -n -e 's/.*=> \(\/[^ ]*\) .*/\1/p' \
            -e 's/^[[:space:]]*\(\/[^ ]*ld-linux[^ ]*\) .*/\1/p' \
        | grep -v ^/root-tree | sort -u >/build/libraries; \
    while read -r library; do \
        mkdir -p "usr/$(dirname "${library#/usr}")"; \
        cp -L "$library" "usr/${library#/usr}"; \
    done </build/libraries; \
    mkdir -p etc proc sys dev tmp var/lib/dpkg/status.d usr/share/sliceproxy usr/share/doc; \
    printf 'root:x:0:0:root:/:/nonexistent\n' >etc/passwd; \
    printf 'root:x:0:\n' >etc/group; \
    printf 'hosts: files dns\n' >etc/nsswitch.conf; \
    cp /etc/os-release etc/; \
    for file in $(cat /build/libraries) /usr/bin/python3.* /usr/lib/python3.*/os.py \
        /usr/lib/python3.*/asyncio/base_events.py; do \
        dpkg-query -S "$(realpath "$file")" "$file" 2>/dev/null || true; \
    done | sed -n -e '/^diversion/d' -e 's/: .*//p' | sort -u >/build/owners; \
    while read -r package; do \
        name=${package%%:*}; \
        dpkg-query -s "$package" >"var/lib/dpkg/status.d/$name"; \
        dpkg-query -W -f '${Package} ${Version}\n' "$package"; \
        mkdir -p "usr/share/doc/$name"; \
        cp -L "/usr/share/doc/$name/copyright" "usr/share/doc/$name/" 2>/dev/null || true; \
    done </build/owners >usr/share/sliceproxy/versions; \
    python3 -m pip list --path usr/local/lib/python3.*/dist-packages --format freeze \
        --disable-pip-version-check >>usr/share/sliceproxy/versions; \
    usr/bin/python3 --version

COPY tools/sbom /build/tools/
ARG VERSION=0.2.0
ARG SOURCE_DATE_EPOCH=
RUN python3 /build/tools/sbom /root-tree sliceproxy "$VERSION" \
        >/root-tree/usr/share/sliceproxy/sbom.spdx.json

# --- the image ------------------------------------------------------------------------------------

FROM scratch
COPY --from=tree /root-tree /
ARG BASE
ARG VERSION=0.2.0
# The commit: --build-arg REVISION=$(git rev-parse HEAD)
ARG REVISION=unknown
# https://github.com/opencontainers/image-spec/blob/main/annotations.md
LABEL org.opencontainers.image.title="sliceproxy" \
    org.opencontainers.image.description="A Kubernetes service proxy with a constant number of nftables rules" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.base.name="${BASE}"
# No bytecode is written, and log lines are not buffered.
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PATH=/usr/local/bin:/usr/bin
# Root by number, and meant to run with NET_ADMIN as its only capability: that is less than it
# sounds, since uid 0 without capabilities may not even read another user's files. A capability for
# another uid would have to be ambient, which Kubernetes cannot give (KEP-2763), or come from the
# interpreter's file, which needs allowPrivilegeEscalation and gives it to whoever runs that.
USER 0:0
ENTRYPOINT ["/usr/local/bin/sliceproxy"]
CMD ["run"]
