# Sourced by demo.sh, docs.sh and test.sh: makes a virtual environment of pinned packages once.
#   environment NAME REQUIREMENTS
environment() {
    local folder=".venv-$1" stamp
    stamp="$folder/$(cat scripts/requirements*.txt scripts/constraints.txt pyproject.toml | cksum | tr -d ' ')"
    if [ ! -f "$stamp" ]; then
        rm -rf "$folder"
        python3 -m venv "$folder"
        "$folder/bin/pip" install --quiet --disable-pip-version-check -r "$2" -c scripts/constraints.txt
        "$folder/bin/pip" install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
        touch "$stamp"
    fi
    PATH="$PWD/$folder/bin:$PATH"
}
