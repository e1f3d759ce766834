#!/usr/bin/env bash
# Models on a GPU, from outside: its caches against the CPU's and its memory against what was
# predicted, kernels chosen layer by layer, conversations. Exit status 77 where there is no GPU.
# Usage: model_gpu_test.sh SAGELM_BINARY SOURCE_DIR
source "$(dirname "$0")/../apps/common.sh"
export XDG_CACHE_HOME=$work/cache
gpu=(--device cuda)
if ! "$sagelm" info "${gpu[@]}" >/dev/null 2>"$work/err"; then
  cat "$work/err"
  grep -q "cannot be used" "$work/err" && exit 77
  exit 1
fi
seq -f 'The ship number %g came home at last, and everybody was glad.' 200 >"$work/text"

number() { sed -n "s/^ *\"$1\": \([0-9.e+-]*\),\{0,1\}$/\1/p" "$work/out" | head -n 1; }
# within BOUND A B WHAT: A and B differ by at most that part of B.
within() {
  awk -v a="$2" -v b="$3" -v bound="$1" \
    'BEGIN { d = a - b; exit !(a != "" && b > 0 && (d < 0 ? -d : d) <= bound * b) }' ||
    fail "$4: $2, not within $1 of $3"
}

# Each cache predicts a text as it does on the CPU, in windows computed at once and in chunks.
perplexity=(perplexity --file "$work/text" --ctx 1024 --limit 2 --json)
for kv in fp16 int8 int4; do
  run 0 "${perplexity[@]}" --device cpu --threads 2 --attention sage2 --kv-cache "$kv"
  cpu=$(number perplexity)
  for batch in 2048 300; do
    run 0 "${perplexity[@]}" "${gpu[@]}" --attention sage2 --kv-cache "$kv" --batch-tokens $batch
    within 0.02 "$(number perplexity)" "$cpu" "perplexity, $kv cache, $batch tokens at once"
  done
done

# What a run holds is what was said before it.
for kv in fp16 int8 int4; do
  run 0 bench model "${gpu[@]}" --attention sage2 --kv-cache "$kv" --batch-tokens 256 \
    --prompt-tokens 1500 --decode-at 1500 --decode-tokens 8 --runs 1 --json
  within 0.03 "$(number most_bytes)" "$(number predicted_bytes)" "memory with an $kv cache"
done

# A kernel for each layer: named, calibrated, compared.
mixed=fp16/sage2/sage1/sage2/fp16/sage2-4b
run 0 "${perplexity[@]}" "${gpu[@]}" --attention fp16
fp16=$(number perplexity)
run 0 "${perplexity[@]}" "${gpu[@]}" --attention $mixed
holds "$work/out" '"attention": "fp16 in layers 0, 4; sage1 in layer 2; sage2-8b in layers 1, 3; '
within 0.05 "$(number perplexity)" "$fp16" "perplexity with $mixed"
run 0 calibrate "${gpu[@]}" --threshold 0.9997 --file "$work/text" --windows 1 \
  --calibration "$work/own.json" --json
adaptive=(--attention sage-adaptive --calibration "$work/own.json")
chosen=$(sed -n 's/^  "attention": "\(.*\)",$/\1/p' "$work/out")
[ -n "$chosen" ] || fail "calibrate names no kernels"
run 0 "${perplexity[@]}" "${gpu[@]}" "${adaptive[@]}"
holds "$work/out" "\"attention\": \"$chosen\""
within 0.02 "$(number perplexity)" "$fp16" "perplexity with sage-adaptive, $chosen"
run 0 compare perplexity "${gpu[@]}" --file "$work/text" --ctx 512 --limit 2 --layers \
  --attention "fp16,sage-adaptive,$mixed" --calibration "$work/own.json" --json
holds "$work/out" "\"attention\": \"$chosen\""
holds "$work/out" "sage1 in layer 2"

# The cosine of every layer with float64, in every cache: that of queries and keys as rotated.
run 0 compare perplexity "${gpu[@]}" --file "$work/text" --ctx 512 --limit 1 --layers \
  --attention fp16,sage2+kv-cache=fp16,sage2+kv-cache=int8,sage2+kv-cache=int4
[ "$(awk '/^cosine/ { on = 1 } /^worst/ && on { on = 0; for (i = 2; i <= NF; ++i) n += $i > 0.98 }
  END { print n }' "$work/out")" = 4 ] || fail "cosines of layers: $(grep worst "$work/out")"

# Turns taken back are as if they had not been.
for kv in int8 int4; do
  chat=(chat "${gpu[@]}" --kv-cache "$kv" --temp 0 -n 150 --ignore-eos)
  story="Tell me a story about a ship and the people on it."
  printf '%s\n' "$story" "What was its name?" /undo "And then?" /stats |
    "$sagelm" "${chat[@]}" >"$work/out" 2>&1 || fail "chat: $(tail -n 3 "$work/out")"
  holds "$work/out" "took back: What was its name?"
  held=$(sed -n 's/^2 turns, \([0-9]*\) of.*/\1/p' "$work/out" | head -n 1)
  [ -n "$held" ] || fail "chat: $(tail -n 3 "$work/out")"
  printf '%s\n' "$story" "And then?" /stats | "$sagelm" "${chat[@]}" >"$work/out" 2>&1
  holds "$work/out" "2 turns, $held of"
done

finish
