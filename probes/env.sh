export ROOT=/tmp/work/bf; . /tmp/work/env.sh
