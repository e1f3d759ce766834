#!/usr/bin/env bash
# --attention sage-adaptive: made once, kept, shown, refused where it does not fit.
# Usage: adaptive_test.sh SAGELM_BINARY SOURCE_DIR
source "$(dirname "$0")/common.sh"
export XDG_CACHE_HOME=$work/cache
adaptive=(--device cpu --threads 1 --attention sage-adaptive)

# Before there is a choice, info says so; the first run makes it, and later ones find it.
run 0 info "${adaptive[@]}"
holds "$work/out" "not chosen yet"
run 0 generate "${adaptive[@]}" --prompt "Once" -n 2 --json
holds "$work/out" '"attention": "sage2-8b'
[ "$(find "$work/cache/sagelm/calibration" -type f | wc -l)" = 1 ] || fail "the choice is not kept"
kept=$(find "$work/cache/sagelm/calibration" -type f)
run 0 info "${adaptive[@]}"
holds "$work/out" "layer 5"
holds "$work/out" "built-in"
holds "$work/out" "$kept"
run 0 info "${adaptive[@]}" --json
holds "$work/out" '"cosines"'
holds "$work/out" '"layer_attention"'

# A threshold and a text of the user's own; the kernels that ran are in every result.
seq -f 'The ship number %g came home at last, and everybody was glad.' 200 >"$work/text"
run 0 calibrate --device cpu --threads 1 --threshold 0.9997 --file "$work/text" --windows 1 \
  --calibration "$work/own.json" --json
holds "$work/out" "\"text\": \"$work/text\""
own=(--calibration "$work/own.json")
mixed=$(sed -n 's/^  "attention": "\(.*\)",$/\1/p' "$work/out")
grep -q "; sage2-8b in layer" <<<"$mixed" || fail "calibrate did not mix kernels: $mixed"
run 0 generate "${adaptive[@]}" "${own[@]}" --prompt "Once" -n 2 --json
holds "$work/out" "\"attention\": \"$mixed\""
holds "$work/out" '"kv_cache": "fp16"'
run 0 compare perplexity --device cpu --threads 1 --file "$work/text" --ctx 64 --limit 2 \
  --attention fp16,sage-adaptive "${own[@]}" --json
holds "$work/out" "\"attention\": \"$mixed\""
run 0 perplexity "${adaptive[@]}" "${own[@]}" --file "$work/text" --ctx 64 --limit 2
holds "$work/out" "$mixed"
run 0 bench model --device cpu --threads 1 --attention sage2,sage-adaptive "${own[@]}" \
  --prompt-tokens 8 --decode-at 8 --decode-tokens 2 --runs 1 --json
holds "$work/out" "\"kernel\": \"$mixed\""
run 0 chat "${adaptive[@]}" "${own[@]}" --prompt "Who are you?" -n 2
holds "$work/err" "$mixed"
run 0 generate --device cpu --attention fp16/sage2/fp16/sage2/fp16/sage2 --prompt "Once" -n 2 --json
holds "$work/out" '"attention": "fp16 in layers 0, 2, 4; sage2-8b in layers 1, 3, 5'

# What does not fit or cannot be read.
refused 1 "without --no-smooth-k" generate "${adaptive[@]}" "${own[@]}" --prompt x --no-smooth-k
refused 1 "--kv-cache auto, not fp16" info "${adaptive[@]}" "${own[@]}" --kv-cache fp16
refused 2 "int8 KV cache" generate "${adaptive[@]}" "${own[@]}" --prompt x --kv-cache int8
sed 's/"model_hash": "..../"model_hash": "dead/' "$work/own.json" >"$work/other.json"
refused 1 "another model" info "${adaptive[@]}" --calibration "$work/other.json"
head -c 200 "$work/own.json" >"$work/torn.json"
refused 1 "$work/torn.json: not valid JSON" info "${adaptive[@]}" --calibration "$work/torn.json"
refused 1 "directory" info "${adaptive[@]}" --calibration "$work"
refused 2 "sage-adaptive" info --calibration "$work/own.json"
refused 2 "sage-adaptive" compare perplexity --file "$work/text" --attention fp16,sage2 "${own[@]}"
refused 2 "made-up weights" info --random-weights llama-160m --attention sage-adaptive
refused 2 "2 layers" info --attention fp16/sage2
refused 2 "sage2, sage, for a model also sage-adaptive" info --attention sage3
refused 2 "name the kernels" bench attention --device cpu --attention fp16,sage-adaptive
refused 2 "name the kernels" bench attention --device cpu --attention fp16/sage2
refused 2 "--threshold" calibrate --threshold 2
refused 2 "--threshold" calibrate --threshold nan
refused 2 "--windows" calibrate --windows 2
: >"$work/empty"
refused 1 "$work/empty" calibrate --file "$work/empty"
refused 1 "$work/none" calibrate --file "$work/none"
refused 1 "cannot write the calibration" calibrate --device cpu --calibration "$work/text/x.json"

# A file in the cache that is torn is made again; without a place to keep it the choice still runs.
head -c 100 "$kept" >"$work/torn.json"
cp "$work/torn.json" "$kept"
run 0 generate "${adaptive[@]}" --prompt "Once" -n 1
holds "$work/err" "it is not used"
run 0 generate "${adaptive[@]}" --prompt "Once" -n 1
[ ! -s "$work/err" ] || fail "the choice was not made again: $(cat "$work/err")"
export XDG_CACHE_HOME=$work/text/no
run 0 generate "${adaptive[@]}" --prompt "Once" -n 1
holds "$work/err" "the calibration is not kept"

finish
