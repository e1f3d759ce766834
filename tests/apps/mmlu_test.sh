#!/usr/bin/env bash
# sagelm mmlu from outside: results, JSON, sharing, both layouts, Ctrl-C and --resume, wrong data.
# Usage: mmlu_test.sh SAGELM_BINARY SOURCE_DIR
source "$(dirname "$0")/common.sh"
subcommand=(mmlu --threads 1)

field() {  # FILE NAME: the first value of that name
  sed -n "s/^ *\"$2\": *\([^,]*\),*$/\1/p" "$1" | head -n 1
}

# Three subjects of 30 questions and 5 examples, the same as CSV and as JSONL.
csv=$work/csv
jsonl=$work/jsonl
mkdir -p "$csv/test" "$csv/dev" "$jsonl"
for subject in anatomy marketing virology; do
  for i in $(seq 35); do
    question="In $subject, what did the old captain number $i see when he looked out upon the sea?"
    if [ "$i" -le 5 ]; then split="dev"; else split="test"; fi
    echo "\"$question\",\"Rain, $i\",A storm,Nothing,Two ships,$((i % 4))" \
      >>"$csv/$split/${subject}_$split.csv"
    printf '{"question":"%s","choices":["Rain, %d","A storm","Nothing","Two ships"],' \
      "$question" "$i" >>"$jsonl/$split.jsonl"
    printf '"answer":%d,"subject":"%s"}\n' "$((i % 4))" "$subject" >>"$jsonl/$split.jsonl"
  done
done

# Tables and JSON; both layouts and both ways of running give the same answers.
run 0 --data "$csv" --attention fp16
for text in "questions      90" "subjects       3 of 57" "prompt         lm-eval" \
  "anatomy " "STEM " "other " "overall " "micro (by question)"; do
  holds "$work/out" "$text"
done
run 0 --data "$csv" --attention fp16 --json
cp "$work/out" "$work/shared"
holds "$work/out" '"accuracy_micro"'
holds "$work/out" '"accuracy_macro"'
holds "$work/out" '"stderr_micro"'
holds "$work/out" '"data_sha256"'
run 0 --data "$csv" --attention fp16 --no-share --json
cp "$work/out" "$work/whole"
run 0 --data "$jsonl" --attention fp16 --json
for name in correct answers prompt_tokens accuracy_micro accuracy_macro stderr_micro; do
  value=$(field "$work/shared" $name)
  [ -n "$value" ] || fail "no $name in the JSON"
  [ "$value" = "$(field "$work/out" $name)" ] || fail "JSONL changes $name"
  [ "$value" = "$(field "$work/whole" $name)" ] || fail "--no-share changes $name"
done
[ "$(field "$work/whole" tokens_run)" = "$(field "$work/whole" prompt_tokens)" ] ||
  fail "--no-share shares"
[ "$(field "$work/shared" tokens_run)" -lt "$(field "$work/shared" prompt_tokens)" ] ||
  fail "nothing is shared"
for shots in 0 1 5; do
  for prompt in lm-eval original; do
    run 0 --data "$csv" --shots $shots --prompt $prompt --limit 2 --subjects virology,anatomy --json
    holds "$work/out" "\"shots\": $shots"
    holds "$work/out" "\"prompt\": \"$prompt\""
    holds "$work/out" '"questions": 4'
  done
done

# A run that is stopped says so, and goes on from its journal.
"$sagelm" mmlu --threads 1 --data "$csv" --attention fp16 --json --batch-tokens 128 \
  --resume "$work/journal" >"$work/out" 2>"$work/err" </dev/null &
pid=$!
until [ -e "$work/journal" ] && [ "$(wc -l <"$work/journal")" -ge 2 ]; do
  kill -0 $pid 2>/dev/null || break
  sleep 0.02
done
kill -INT $pid 2>/dev/null
if ! wait $pid; then
  holds "$work/out" '"partial": true'
  holds "$work/err" "interrupted: the result is partial"
fi
run 0 --data "$csv" --attention fp16 --json --batch-tokens 128 --resume "$work/journal"
cp "$work/out" "$work/resumed"
run 0 --data "$csv" --attention fp16 --json --batch-tokens 128
for name in correct answers questions prompt_tokens accuracy_micro accuracy_macro; do
  [ "$(field "$work/out" $name)" = "$(field "$work/resumed" $name)" ] || fail "resuming: $name"
done
refused 1 "journal" --data "$csv" --attention fp16 --batch-tokens 128 --shots 3 \
  --resume "$work/journal"

# Wrong data is named before a model is looked for.
none="-m $work/none"
# shellcheck disable=SC2086
{
  refused 1 "$work/none" --data "$csv" $none
  refused 1 "$work/other is not a directory" --data "$work/other" $none
  refused 2 "astrology" --data "$csv" --subjects astrology $none
  refused 1 "nutrition_dev.csv" --data "$csv" --subjects marketing,nutrition $none
  sed -i '3s/,[0-3]$/,E/' "$csv/test/virology_test.csv"
  refused 1 "virology_test.csv:3: the answer is 'E'" --data "$csv" $none
  sed -i '3s/,E$//' "$csv/test/virology_test.csv"
  refused 1 "virology_test.csv:3: 5 columns" --data "$csv" $none
  printf 'caf\xe9?,a,b,c,d,0\n' >"$csv/dev/virology_dev.csv"
  refused 1 "virology_dev.csv:1: byte 3 of the file (0xe9) is not UTF-8" --data "$csv" $none
  rm "$csv/dev/virology_dev.csv"
  refused 1 "virology_dev.csv" --data "$csv" $none
  sed -i '7s/"answer":[0-3]/"answer":4/' "$jsonl/test.jsonl"
  refused 1 "test.jsonl:7: the answer is not one of A to D" --data "$jsonl" $none
  sed -i '2s/"question"/"text"/' "$jsonl/dev.jsonl"
  refused 1 'dev.jsonl:2: there is no field "question"' --data "$jsonl" $none
}
refused 2 "lm-eval, original" --data "$csv" --prompt bogus
refused 2 "--shots" --data "$csv" --shots 6
refused 2 "--limit" --data "$csv" --limit 0
refused 2 "--data" --shots 1

finish
