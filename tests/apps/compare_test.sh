#!/usr/bin/env bash
# `sagelm compare` from outside: the table, its JSON, the page, and one sentence for wrong input.
# Usage: compare_test.sh SAGELM_BINARY SOURCE_DIR
source "$(dirname "$0")/common.sh"
subcommand=(compare)

text=$work/text
for i in $(seq 1 40); do
  echo "In the year $i the old ship came back to the harbour, and $((i * 7)) people stood in the rain."
done >"$text"
for i in 1 2 3; do
  echo "{\"text\": \"She had $i dogs and a cat, and of all her animals she loved best the cat\"}"
done >"$work/passages"

# A setting against itself is no distance at all.
run 0 perplexity --file "$text" --ctx 64 --limit 4 --attention fp16,fp16 --json
holds "$work/out" '"kl_max": 0.0'
holds "$work/out" '"same_top": 1.0'
holds "$work/out" '"difference": 0.0'
holds "$work/out" '"excludes_zero": false'
holds "$work/out" '"model_hash": "'
holds "$work/out" '"machine": "'
holds "$work/out" '"windows": 4'

# All of it: table, layers, page and JSON file.
run 0 perplexity --file "$text" --ctx 64 --limit 4 --attention fp16,sage1,sage2+no-smooth-k \
  --layers --report "$work/a page/deep" --json "$work/json"
for row in "perplexity" "difference" "relative" "95 % interval" "excludes zero" "nll mean" \
  "KL mean" "KL 99 %" "KL max" "same top-1" "RMS Δp" "tokens/s" "memory" "cosine similarity" \
  "relative L1" "RMSE" "worst" "K not smoothed" "4 of 4 windows"; do
  holds "$work/out" "$row"
done
for field in '"layers"' '"layers_note"' '"rms_probability_change"' '"relative_difference"' '"smooth_k": false'; do
  holds "$work/json" "$field"
done
page="$work/a page/deep/index.html"
for part in "<svg" "model hash" "machine" "--attention fp16,sage1,sage2+no-smooth-k" \
  "How far the distributions are" "Speed" "Error of attention by layer"; do
  holds "$page" "$part"
done
holds "$page" "&#39;$work/a page/deep&#39;"  # the command as a shell takes it
grep -qE 'https?:|<script|<link|<img' "$page" && fail "the page asks for something else"

# The perplexities are those of `sagelm perplexity`, and no figure depends on the batch.
"$sagelm" perplexity --file "$text" --ctx 64 --attention sage1 --json >"$work/one" 2>/dev/null
run 0 perplexity --file "$text" --ctx 64 --attention fp16,sage1 --json
one=$(sed -n 's/^ *"perplexity": \([0-9]*\.[0-9]\{3\}\).*/\1/p' "$work/one")
[ -n "$one" ] || fail "no perplexity in $(cat "$work/one")"
holds "$work/out" "\"value\": $one"
figures() { sed -n '/"metrics"/,/"rms_probability_change_stderr"/p' "$work/out" | grep -v memory; }
figures | grep -vE 'second|timed' >"$work/first"
run 0 perplexity --file "$text" --ctx 64 --attention fp16,sage1 --json --batch-tokens 16
figures | grep -vE 'second|timed' | cmp -s - "$work/first" || fail "the batch changed a figure"

# MMLU: the figures are those of `sagelm mmlu`, shared or not; wrong data is named first.
mkdir -p "$work/mmlu/test" "$work/mmlu/dev"
for subject in anatomy marketing; do
  for i in $(seq 12); do
    split="test"
    [ "$i" -le 3 ] && split="dev"
    echo "In $subject what did captain $i see?,Rain,A storm,Nothing,Two ships,$((i % 4))" \
      >>"$work/mmlu/$split/${subject}_$split.csv"
  done
done
run 0 mmlu --data "$work/mmlu" --shots 3 --attention fp16,sage2 --report "$work/mmlu page" --json
for field in '"accuracy"' '"accuracy_macro"' '"accuracy_STEM"' '"accuracy_other"' '"nll_mean"' \
  '"kl_mean"' '"same_top"' '"rms_probability_change"' '"questions": 18' '"data_sha256"'; do
  holds "$work/out" "$field"
done
holds "$work/mmlu page/index.html" "MMLU of demo under 2 settings"
for setting in fp16 sage2; do
  "$sagelm" mmlu --data "$work/mmlu" --shots 3 --attention $setting --json >"$work/one" 2>/dev/null
  one=$(sed -n 's/^ *"accuracy_micro": \([0-9.]*\).*/\1/p' "$work/one" | head -n 1)
  sed -n "/\"name\": \"$setting\"/,\$p" "$work/out" | sed -n '/"accuracy": {/,/}/p' | head -n 4 |
    grep -q "\"value\": $one" || fail "$setting: compare mmlu is not mmlu ($one)"
done
run 0 mmlu --data "$work/mmlu" --shots 3 --attention fp16,sage1 --limit 2 --no-share
holds "$work/out" "4 of 4 questions"
echo "A question,Rain,A storm,Nothing,Two ships,E" >>"$work/mmlu/test/anatomy_test.csv"
refused 1 "anatomy_test.csv:10" mmlu --data "$work/mmlu" -m /nowhere --attention fp16,sage1

# A flag counts for every setting.
run 0 perplexity --file "$text" --ctx 64 --limit 1 --attention sage1,sage2 --no-smooth-k \
  --kv-cache fp16 --device cpu --json
[ "$(grep -c '"smooth_k": false' "$work/out")" = 2 ] || fail "--no-smooth-k was not for all"

# LAMBADA, and per-document protocols.
run 0 lambada --file "$work/passages" --attention fp16,sage2 --json
holds "$work/out" '"accuracy"'
holds "$work/out" '"passages": 3'
holds "$work/out" '"variant": "word"'
run 0 perplexity --file "$text" --protocol lm-eval-0.4.9.2 --attention fp16,sage2
holds "$work/out" "bits per byte"

# A run that was killed goes on; another one's journal is refused.
run 0 perplexity --file "$text" --ctx 64 --attention fp16,sage1 --batch-tokens 64 --json
figures | grep -vE 'second|timed' >"$work/first"
{
  timeout -s KILL 1 "$sagelm" compare perplexity --file "$text" --ctx 64 --attention fp16,sage1 \
    --batch-tokens 64 --resume "$work/journal" >"$work/out"
} 2>/dev/null
run 0 perplexity --file "$text" --ctx 64 --attention fp16,sage1 --batch-tokens 64 \
  --resume "$work/journal" --json
figures | grep -vE 'second|timed' | cmp -s - "$work/first" || fail "a resumed run differs"
refused 1 "journal" perplexity --file "$text" --ctx 64 --attention fp16,sage2 --batch-tokens 64 \
  --resume "$work/journal"

# Wrong input.
refused 2 "two settings" perplexity --file "$text" --attention fp16
refused 2 "sage9" perplexity --file "$text" --attention fp16,sage9
refused 2 "unknown option 'x'" perplexity --file "$text" --attention fp16,sage1+x
refused 2 "has kv-cache twice" perplexity --file "$text" --attention fp16,sage2+kv-cache=int8+kv-cache=fp16
refused 2 "names no attention" perplexity --file "$text" --attention fp16,
refused 2 "names no attention" perplexity --file "$text" --attention fp16,+no-smooth-k
refused 2 "16 settings" perplexity --file "$text" \
  --attention "$(printf 'fp16,%.0s' $(seq 16))sage1"
refused 2 "tpu" perplexity --file "$text" --attention fp16,fp16+device=tpu
refused 2 "--layers" perplexity --file "$text" --layer-windows 2
refused 2 "--file" perplexity
refused 1 "$work/none" perplexity --file "$work/none"
refused 1 "is none" perplexity --file "$text" --report "$text"
refused 1 "$text:1: not a JSON object" lambada --file "$text"
refused 2 "" bogus
refused 2 "" perplexity --file "$text" --temp 1

finish
