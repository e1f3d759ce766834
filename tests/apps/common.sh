# What the tests of the program from outside share. Sourced with the test's own arguments:
#   SAGELM_BINARY SOURCE_DIR
# `subcommand` (an array, empty here) goes in front of every call's arguments. A test ends with
# `finish`.
set -u
sagelm=$1
export SAGELM_DEMO_MODEL=$2/models/demo
export OMP_WAIT_POLICY=passive  # tests run side by side: threads that wait must not spin
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failures=0
subcommand=()

fail() {
  echo "FAILED: $*"
  failures=$((failures + 1))
}

# run STATUS ARGUMENTS...: stdout to $work/out, stderr to $work/err, which are checked afterwards.
run() {
  local expected=$1 status
  shift
  "$sagelm" "${subcommand[@]}" "$@" >"$work/out" 2>"$work/err" </dev/null
  status=$?
  [ "$status" = "$expected" ] || {
    fail "sagelm ${subcommand[*]} $*: exit status $status, not $expected"
    cat "$work/err"
  }
}

# refused STATUS TEXT ARGUMENTS...: one sentence on stderr that holds TEXT, nothing on stdout.
refused() {
  local status=$1 text=$2 call
  shift 2
  run "$status" "$@"
  call="sagelm ${subcommand[*]} $*"
  [ -s "$work/out" ] && fail "$call: wrote to stdout"
  [ "$(wc -l <"$work/err")" = 1 ] || fail "$call: stderr is not one line: $(cat "$work/err")"
  grep -q "^sagelm: error: " "$work/err" || fail "$call: no 'sagelm: error:'"
  grep -qF -- "$text" "$work/err" || fail "$call: no '$text' in: $(cat "$work/err")"
}

holds() {  # FILE TEXT
  grep -qF -- "$2" "$1" || fail "no '$2' in: $(head -c 1000 "$1")"
}

finish() {
  [ "$failures" = 0 ] || exit 1
  echo "all passed"
  exit 0
}
