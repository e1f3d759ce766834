#!/usr/bin/env bash
# The command line from outside: results, JSON, exit statuses, and one sentence for wrong input.
# Usage: cli_test.sh SAGELM_BINARY SOURCE_DIR
source "$(dirname "$0")/common.sh"
prompt="It was a dark and stormy night; the rain fell in torrents, and the old house at the end of the lane"

# Help and version.
run 0 --version
holds "$work/out" "sagelm 0."
for command in chat generate perplexity lambada tokenize info; do
  run 0 "$command" --help
  holds "$work/out" "--model"
done

# tokenize.
run 0 tokenize --text "$prompt" --json
holds "$work/out" '"ids"'
ids=$(tr -d ' \n' <"$work/out" | sed 's/.*"ids":\[\([0-9,]*\)\].*/\1/')
[ "$ids" = "1,558,322,261,1098,283,3791,8130,852,8143,263,3210,947,291,1861,3107,8120,8131,283,263,720,845,363,263,847,281,263,7991" ] ||
  fail "ids of the prompt: $ids"
run 0 tokenize --text "It" --no-bos
[ "$(cat "$work/out")" = "$(printf '558\t\xe2\x96\x81It')" ] || fail "tokenize: $(cat "$work/out")"
printf 'It' >"$work/text"
run 0 tokenize --file "$work/text" --json "$work/json"
holds "$work/out" "558"
holds "$work/json" '"pieces"'
refused 2 "give either --text or --file" tokenize
run 0 tokenize --text It --json "" --no-bos  # an unset variable as the file's name
holds "$work/out" '558'
refused 2 "--temp" tokenize --text x --temp 1
refused 2 "--device" tokenize --text x --device cpu
refused 1 "$work/none" tokenize --file "$work/none"
refused 1 "$work/none does not exist" tokenize --text x -m "$work/none"
refused 1 "neither a model directory nor" tokenize --text x -m "$work/text"
refused 2 "empty" tokenize --text x -m ""

# info.
run 0 info
holds "$work/out" "13767552"
run 0 info --json --ctx 512 --attention fp16
holds "$work/out" '"kv_bytes": 4718592'
refused 2 "2048" info --ctx 4096
refused 2 "sage9" info --attention sage9
refused 2 "tpu" info --device tpu
refused 1 "cannot be used" info --device cuda:99
refused 2 "cannot read an int8 KV cache" info --kv-cache int8 --attention fp16
run 0 info --json --kv-cache int8
holds "$work/out" '"kv_bytes_per_token": 4614'
holds "$work/out" '"kv_cache": "int8"'
run 0 info --json --attention sage1
holds "$work/out" '"kv_cache": "fp16"'
refused 2 "threads" info --threads 0
refused 2 "--seed" info --seed 1
export SAGELM_CPU_ISA=bogus
refused 2 "bogus" generate --prompt x -n 1
unset SAGELM_CPU_ISA

# generate.
run 0 generate --attention fp16 --temp 0 -n 64 --prompt "$prompt" --json --logprobs
holds "$work/out" '"text": "was a dark, dark, and deserted street. The rain was falling, and the snow was falling.'
holds "$work/out" '"prompt_logprobs"'
holds "$work/out" '"stop_reason": "max-tokens"'
run 0 generate --temp 0 -n 4 --prompt "$prompt" --attention fp16
[ "$(cat "$work/out")" = "was a dark," ] || fail "generate: $(cat "$work/out")"
run 0 generate -n 8 --prompt "$prompt" --seed 5
cp "$work/out" "$work/first"
run 0 generate -n 8 --prompt "$prompt" --seed 5
cmp -s "$work/out" "$work/first" || fail "the same seed gave two texts"
run 0 generate -n 6 --prompt "$prompt" --seed 5 --samples 3 --json
[ "$(grep -c '"seed": [567],*$' "$work/out")" = 4 ] || fail "samples: $(cat "$work/out")"
run 0 generate -n 6 --prompt "$prompt" --samples 2 --temp 0
[ "$(sed -n 2p "$work/out")" = "$(sed -n 4p "$work/out")" ] || fail "samples: $(cat "$work/out")"
for flags in "--temp -1" "--temp nan" "--top-p 0" "--top-p 2" "--top-k -1" "--min-p 2" \
  "--repeat-penalty 0" "--repeat-last-n -2" "-n 0" "-n x" "--seed x" "--threads 2000" "--ctx 0" \
  "--kv-cache fp8" "--samples 0" "--stop"; do
  # shellcheck disable=SC2086
  refused 2 "" generate --prompt x $flags
done
for flag in -n --ctx --threads --device --attention; do
  refused 2 "" generate --prompt x "$flag" ""
done
for flag in --model --temp --top-k --seed --calibration; do
  refused 2 "the value is empty" generate --prompt x "$flag" ""
done
refused 2 "--file: the value is empty" generate --file ""
refused 2 "--head-dim" bench attention --head-dim 512
refused 2 "--json" generate --prompt x --logprobs
refused 2 "" generate --prompt x --file "$work/text"
refused 2 "" generate --prompt x --bogus
refused 2 "no command 'bogus'" bogus
refused 2 "no option '--bogus'" --bogus
refused 2 "no 'bogus' in sagelm bench" bench bogus
refused 2 "A subcommand is required" bench
refused 2 "at most" generate --prompt x --seed 18446744073709551616
refused 2 "see sagelm bench model --help" bench model --runs 0
refused 2 "nan is not from 0 to 60 seconds" bench model --rest nan
refused 2 "nan is not from 0 to 60 seconds" bench attention --rest nan
refused 2 "-1 is not from 0 to 60 seconds" bench attention --rest -1
refused 1 "context" generate --prompt "$prompt" --ctx 8
refused 1 "empty" generate --prompt "" --no-bos
refused 1 "$work/none/x" generate --prompt x --json "$work/none/x"
"$sagelm" generate --prompt x -n 4 >/dev/full 2>"$work/err" && fail "a full disk was not noticed"
holds "$work/err" "cannot write to standard output"

# Ctrl-C ends generate as it ends any program.
timeout --preserve-status -s INT 2 "$sagelm" generate --prompt x -n 2000 --ignore-eos --ctx 2048 \
  --threads 1 >/dev/null 2>&1 </dev/null
status=$?
[ "$status" = 130 ] || [ "$status" = 0 ] || fail "generate, interrupted: exit status $status"

# chat.
run 0 chat --prompt "Who are you?" --temp 0 -n 30 --attention fp16 --show-prompt-tokens
holds "$work/out" "I am the first to come to you, and I am the first to come to you."
holds "$work/err" "prompt ids: 1 2336 2396 8145 8141 8189 2677 462 333 8150 2336 50 2396 8145 8141 8189"
holds "$work/err" "attention  fp16"
printf 'Who are you?\n\n/stats\n/bogus\n/undo\n/save %s\n/exit\nnever read\n' "$work/saved" |
  "$sagelm" chat -n 5 >"$work/out" 2>"$work/err" || fail "chat from a pipe failed"
[ "$(wc -l <"$work/out")" = 1 ] || fail "chat answered more than one line: $(cat "$work/out")"
holds "$work/err" "1 turns"
holds "$work/err" "unknown command /bogus"
holds "$work/err" "took back: Who are you?"
holds "$work/saved" '"sagelm-chat"'
printf 'One\nTwo\n/save %s\n' "$work/saved" | "$sagelm" chat --temp 0 -n 9 >"$work/first" 2>/dev/null
printf '/load %s\n/undo\nTwo\n' "$work/saved" |
  "$sagelm" chat --temp 0 -n 9 >"$work/out" 2>/dev/null || fail "chat could not load"
[ "$(tail -n 1 "$work/first")" = "$(cat "$work/out")" ] || fail "a loaded chat goes on differently"
# What was taken back is no longer in use, whoever said it first.
used() { sed -n 's/.* turns, \([0-9]*\) of .*/\1/p' "$work/err" | sed -n "$1p"; }
printf 'One\n/undo\n/stats\nTwo\n' | "$sagelm" chat --temp 0 -n 9 >"$work/out" 2>"$work/err"
holds "$work/err" "0 turns, 0 of"
printf 'Two\n' | "$sagelm" chat --temp 0 -n 9 >"$work/first" 2>/dev/null
[ "$(tail -n 1 "$work/out")" = "$(cat "$work/first")" ] || fail "a turn that was taken back is heard"
printf 'One\n/stats\n/regen\n/stats\n/undo\n/stats\nTwo\n' |
  "$sagelm" chat --temp 0 -n 9 --system "Be kind." >"$work/out" 2>"$work/err"
[ "$(used 1)" = "$(used 2)" ] || fail "an answer given again takes other tokens: $(cat "$work/err")"
[ "$(used 3)" -lt "$(used 2)" ] || fail "/undo leaves tokens in use: $(cat "$work/err")"
printf 'Two\n' | "$sagelm" chat --temp 0 -n 9 --system "Be kind." >"$work/first" 2>/dev/null
[ "$(tail -n 1 "$work/out")" = "$(cat "$work/first")" ] || fail "a turn that was taken back is heard"
printf '/load %s\n/undo\nTwo\n/stats\n/undo\n/stats\n' "$work/saved" |
  "$sagelm" chat --temp 0 -n 9 >/dev/null 2>"$work/err"
[ "$(used 2)" -lt "$(used 1)" ] || fail "/undo leaves tokens in use: $(cat "$work/err")"
printf 'a \\\nb\n"""c\nd"""\n' | "$sagelm" chat -n 2 --json >"$work/out" 2>/dev/null
holds "$work/out" '"user": "a \nb"'
holds "$work/out" '"user": "c\nd"'
printf 'One\nTwo\n' | "$sagelm" chat --ctx 24 -n 8 --ignore-eos >/dev/null 2>"$work/err"
[ $? = 1 ] || fail "a full context is no failure"
holds "$work/err" "the context is full"
printf 'One\nTwo\nThree\n' |
  "$sagelm" chat --ctx 48 -n 16 --ignore-eos --on-full drop-oldest-turns >"$work/out" 2>"$work/err" ||
  fail "chat did not drop turns"
holds "$work/err" "dropped the oldest"
[ "$(wc -l <"$work/out")" = 3 ] || fail "not all turns were answered"
"$sagelm" chat </dev/null >"$work/out" 2>/dev/null || fail "the end of the input is no failure"
refused 2 "empty" chat --prompt " "
refused 2 "llama2" chat --chat-template bogus --prompt x

# bench.
run 0 bench model --device cpu --threads 1 --attention fp16,sage2 --prompt-tokens 40 --decode-at 8 \
  --decode-tokens 4 --runs 1 --rest 0.01 --json
for key in '"tokens_per_second"' '"percent_of_linear_layers"' '"percent_of_copy"' '"predicted_bytes"' \
  '"kernel": "sage2-8b' '"in_turns": true' '"rest_seconds": 0.01'; do
  holds "$work/out" "$key"
done
run 0 bench attention --device cpu --threads 1 --tokens 70 --head-dim 64 --heads 2 --kv-heads 1 \
  --mask both --runs 1 --rest 0.01 --json "$work/bench.json"
holds "$work/out" "sage1"
holds "$work/bench.json" '"relative_l1"'
holds "$work/bench.json" '"rest_seconds": 0.01'
[ "$(grep -cE '"cosine": (0\.99|1\.)' "$work/bench.json")" = 6 ] ||
  fail "bench attention's error: $(grep cosine "$work/bench.json")"
refused 2 "llama2-7b" bench model --random-weights bogus
refused 2 "use one of them" bench model -m x --random-weights llama-160m
refused 2 "evenly" bench attention --device cpu --heads 3 --kv-heads 2
run 0 info --random-weights llama2-7b --ctx 8192
holds "$work/out" "6738415616"

finish
