# Sourced by demo.sh, docs.sh and test.sh.

# compileall and pytest answer Ctrl-C with an ordinary exit status, after which bash would go on.
trap 'exit 130' INT

# Makes a virtual environment of pinned packages once.
#   environment NAME REQUIREMENTS
environment() {
    local folder=".venv-$1" stamp
    stamp="$folder/$(cat scripts/requirements*.txt scripts/constraints.txt pyproject.toml | cksum | tr -d ' ')"
    if [ ! -f "$stamp" ]; then
        rm -rf "$folder"
        python3 -m venv "$folder"
        "$folder/bin/pip" install --quiet --disable-pip-version-check --no-compile \
            -r "$2" -c scripts/constraints.txt
        "$folder/bin/pip" install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
        # On all cores, where pip compiles on one. Some packages have templates that are not Python.
        "$folder/bin/python" -m compileall -qq -j 0 "$folder"/lib/python*/site-packages >/dev/null || true
        touch "$stamp"
    fi
    PATH="$PWD/$folder/bin:$PATH"
}

# Debian's Chromium, in which the tests open the server's page. Playwright's own download of a
# browser needs another host than pip does.
install_chromium() {
    if command -v chromium >/dev/null; then
        return
    fi
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "the tests of the server's page need Chromium: sudo apt-get install chromium" >&2
        exit 1
    fi
    apt-get -qq update
    DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends chromium >/dev/null
}

# Installs a library with the older packages that it needs into a folder of the test environment,
# once, for tests that put the folder on PYTHONPATH.
#   peer NAME
peer() {
    local folder=".venv-test/$1/site-packages"
    if [ ! -d "$folder" ]; then
        rm -rf "$folder.new"
        pip install --quiet --disable-pip-version-check --no-deps --target "$folder.new" \
            -r "scripts/requirements-$1.txt"
        mv "$folder.new" "$folder"
    fi
}
