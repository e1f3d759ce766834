#!/usr/bin/env bash
# sagelm perplexity and lambada from outside: protocols, --limit, Ctrl-C, --resume after SIGKILL,
# wrong data. Usage: eval_test.sh SAGELM_BINARY SOURCE_DIR
source "$(dirname "$0")/common.sh"

# What of a JSON result must not depend on how it came about.
figures() {
  grep -vE '"(seconds|tokens_per_second|batch_tokens|device)"' "$1"
}

text=$work/text
passages=$work/passages
for i in $(seq 150); do
  [ $((i % 30)) = 1 ] && printf ' = Voyage %d = \n\n' "$i" >>"$text"
  line="On the morning of day $i the old captain looked out upon the sea"
  printf ' %s , and saw number %d of the ships come home . \n' "$line" $((i * 7)) >>"$text"
  printf '{"text": "%s and saw that his ship number %d was going home"}\n' "$line" "$i" >>"$passages"
done

# Protocols.
for protocol in nonoverlap strided gptq llamacpp lm-eval-0.4.3 lm-eval-0.4.9.2; do
  run 0 perplexity --protocol "$protocol" --ctx 64 --file "$text" --limit 4 --json "$work/$protocol"
  holds "$work/out" "±"
  holds "$work/out" "protocol       $protocol: "
  holds "$work/$protocol" "\"protocol\": \"$protocol\""
done
holds "$work/lm-eval-0.4.3" '"word_perplexity_stderr"'
holds "$work/llamacpp" '"stderr"'
holds "$work/llamacpp" '"tokens_scored": 124'
head -n 3 "$text" >"$work/short"
refused 1 "fewer than one window of 2048" perplexity --protocol sage-paper --file "$work/short"
refused 2 "use one of nonoverlap" perplexity --protocol c4 --file "$text"
refused 2 "no stride" perplexity --protocol gptq --stride 8 --file "$text"
refused 2 "use gptq" perplexity --protocol sage-paper --ctx 4096 --file "$text"

# The result does not depend on threads, nor beyond rounding on batches.
run 0 perplexity --ctx 64 --file "$text" --limit 20 --threads 1 --json "$work/one"
run 0 perplexity --ctx 64 --file "$text" --limit 20 --threads 2 --json "$work/two"
[ "$(figures "$work/one")" = "$(figures "$work/two")" ] || fail "threads change the perplexity"
run 0 perplexity --ctx 64 --file "$text" --limit 20 --threads 2 --batch-tokens 8 --json "$work/small"
[ "$(grep '"nll_mean"' "$work/one" | cut -c 1-20)" = \
  "$(grep '"nll_mean"' "$work/small" | cut -c 1-20)" ] || fail "batches change the perplexity"

# LAMBADA.
run 0 lambada --file "$passages" --json "$work/word"
holds "$work/out" "accuracy"
holds "$work/word" '"perplexity_stderr"'
run 0 lambada --file "$passages" --limit 5 --variant last-token
holds "$work/out" "variant        last-token"
holds "$work/out" "examples       5 of 150 (--limit 5)"
holds "$work/out" "with BOS"
run 0 lambada --file "$passages" --limit 5 --no-bos
holds "$work/out" "without BOS"
refused 2 "word, last-token" lambada --file "$passages" --variant bogus

# --resume: killed twice on the way, the result is that of an undisturbed run.
long=(perplexity --ctx 64 --file "$text" --protocol strided --stride 8 --batch-tokens 64 --threads 1)
run 0 "${long[@]}" --json "$work/undisturbed"
lines() { if [ -f "$1" ]; then wc -l <"$1"; else echo 0; fi; }
for wanted in 3 40; do
  "$sagelm" "${long[@]}" --resume "$work/journal" >/dev/null 2>&1 &
  pid=$!
  while [ "$(lines "$work/journal")" -lt "$wanted" ] && kill -0 $pid 2>/dev/null; do sleep 0.02; done
  kill -KILL $pid 2>/dev/null
  wait $pid 2>/dev/null
done
killed=$(lines "$work/journal")
refused 1 "its ctx is \"64\", not \"128\"" perplexity --ctx 128 --file "$text" --protocol strided \
  --stride 8 --batch-tokens 64 --threads 1 --resume "$work/journal"
refused 1 "its limit is" "${long[@]}" --limit 7 --resume "$work/journal"
run 0 "${long[@]}" --resume "$work/journal" --json "$work/resumed"
[ "$(figures "$work/undisturbed")" = "$(figures "$work/resumed")" ] ||
  fail "a resumed run gives another result: $(diff "$work/undisturbed" "$work/resumed")"
[ "$killed" -ge 40 ] && [ "$killed" -lt "$(lines "$work/journal")" ] ||
  echo "note: the run was over before it could be killed ($killed lines)"
refused 1 "is not a journal" "${long[@]}" --resume "$text"

# Ctrl-C: what there is, marked as partial; the same command goes on.
"$sagelm" "${long[@]}" --resume "$work/journal2" --json "$work/partial" >"$work/out" 2>"$work/err" &
pid=$!
while [ "$(lines "$work/journal2")" -lt 4 ] && kill -0 $pid 2>/dev/null; do sleep 0.02; done
kill -INT $pid 2>/dev/null
wait $pid
if [ $? = 1 ]; then
  holds "$work/out" "(partial: interrupted)"
  holds "$work/partial" '"partial": true'
  holds "$work/err" "the same command goes on from the journal"
else
  echo "note: the run was over before it could be interrupted"
fi
run 0 "${long[@]}" --resume "$work/journal2" --json "$work/resumed"
[ "$(figures "$work/undisturbed")" = "$(figures "$work/resumed")" ] ||
  fail "a run that goes on after Ctrl-C gives another result"

# Wrong data is refused before the model is looked for.
bad=$work/bad
refuse_data() {  # TEXT COMMAND...
  refused 1 "$bad$1" "${@:2}" --file "$bad" -m "$work/no-model"
}
printf 'fine\nnot \xff fine\n' >"$bad"
refuse_data ":2: byte 9 of the file (0xff) is not UTF-8" perplexity
refuse_data ":2: byte 9 of the file (0xff) is not UTF-8" lambada
printf 'PAR1\0\0' >"$bad"
refuse_data ":1: byte 4 of the file is zero" perplexity
: >"$bad"
refuse_data ": the file is empty" perplexity
printf '{"text": "one two"}\n{"sentence": "one two"}\n' >"$bad"
refuse_data ':2: there is no field "text"' lambada
printf 'text\none two\n' >"$bad"
refuse_data ":1: not a JSON object" lambada
printf '{"text": "one two"}\n{"text": ["one"]}\n' >"$bad"
refuse_data ':2: the field "text" is not a string' lambada
printf '{"text": "one two"}\n\n{"text": "one"}\n' >"$bad"
refuse_data ":3: the passage has no last word" lambada
printf '{"text": "one two "}\n' >"$bad"
refuse_data ":1: the passage has no last word: it ends with a space" lambada
refused 1 "$work/no-file" perplexity --file "$work/no-file" -m "$work/no-model"
refused 1 "$work/no-model" perplexity --file "$text" -m "$work/no-model"

finish
