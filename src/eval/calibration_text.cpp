#include "eval/calibration_text.h"

#include <array>

namespace sagelm {
namespace {

constexpr std::string_view kStory =
    "The ferry did not leave at six, as the board had promised, nor at seven. Marta sat on her "
    "suitcase under the only lamp of the pier and counted the people who had given up: first the "
    "couple with the dog, then the two students, then the priest, who had wished everybody a good "
    "night as if he were to blame. By eight there were three of them. An old man in a blue coat "
    "was "
    "peeling an orange with a knife that was far too large for it, and beside him a girl of "
    "perhaps "
    "ten drew ships in the dust with the tip of her shoe. \"It will come,\" the old man said, to "
    "nobody. \"It always comes when the wind turns.\" Marta asked him when the wind would turn. He "
    "looked at the flag over the harbour office, which hung like a wet towel, and held out half of "
    "the orange. \"In twenty-two years,\" he said, \"I have waited here on four hundred evenings, "
    "and I have crossed four hundred times. You are thinking about the waiting. Think about the "
    "crossing.\" She took the orange. Out on the water, very far away and so low that it might "
    "have "
    "been a star, a green light moved, stopped, and moved again. The girl stood up, brushed the "
    "dust "
    "from her knees, and began without any haste to rub out her ships, one after the other, until "
    "only the largest was left. \"That one is ours,\" she said.";

constexpr std::string_view kEncyclopedia =
    "A lighthouse is a tower built to carry a lamp that can be seen from ships. The oldest of "
    "which "
    "a detailed description survives stood on the island of Pharos, off Alexandria, and was "
    "finished "
    "about 280 BC; it is thought to have been more than 100 metres high. Until the eighteenth "
    "century the light came from open fires of wood or coal, which needed several tonnes of fuel "
    "in "
    "a night. Oil lamps with a circular wick, introduced in the 1780s, gave a steadier flame, and "
    "in "
    "1822 the French physicist Augustin Fresnel designed a lens made of concentric rings of glass "
    "that sent most of the light towards the horizon in a narrow beam. A lens of the first order "
    "measures about 2.6 metres in height and may weigh five tonnes; floating it in a bath of "
    "mercury "
    "made it possible to turn it with a clockwork that a keeper wound every few hours. Each "
    "station "
    "has its own sequence of flashes, its character, so that sailors can tell one from another: "
    "\"Fl(3) 15s 42m 21M\" on a chart means three flashes every fifteen seconds, from a height of "
    "42 "
    "metres, visible at a distance of 21 nautical miles. Electric lamps, and later automatic "
    "switches, ended the work of the keepers in most countries between 1960 and 1998. Satellite "
    "navigation has since taken over much of the purpose, but many towers are protected as "
    "monuments, and roughly 18,000 lights are still listed worldwide.";

constexpr std::string_view kDialogue =
    "User: I planted tomatoes in March and they are tall, but there is not a single flower. What "
    "am "
    "I doing wrong?\n\nAssistant: Probably very little. Tall plants without flowers usually have "
    "too "
    "much nitrogen or too little light. Can you tell me three things: what you feed them, how many "
    "hours of sun they get, and how warm the nights are?\n\nUser: I give them a lawn fertiliser "
    "every two weeks, because I had some left. They stand at a south wall, so maybe eight hours of "
    "sun. At night it is around 12 degrees.\n\nAssistant: Then it is the fertiliser. Lawn food is "
    "made to grow leaves: its first number, for nitrogen, is high, and the second and third, for "
    "phosphorus and potassium, are low. Here is what I would do:\n1. Stop feeding for three weeks, "
    "and water as usual.\n2. Pinch out the side shoots that grow between the stem and a leaf.\n3. "
    "When the first flowers open, use a tomato feed, for example 4-3-8, once a week.\nThe cool "
    "nights "
    "slow things down too, but they won't stop the flowers.\n\nUser: Thank you! Should I cut off "
    "the "
    "top of the plants?\n\nAssistant: Not yet. Do that in August, two leaves above the last bunch "
    "that you want to ripen.";

constexpr std::string_view kProgram =
    "Counting words is a good first exercise. The program below reads a file, splits each line at "
    "blanks, and prints the ten words that occur most often, with their counts.\n\n"
    "import sys\nfrom collections import Counter\n\n"
    "def count_words(path):\n    counts = Counter()\n    with open(path, encoding=\"utf-8\") as "
    "lines:\n        for number, line in enumerate(lines, start=1):\n            for word in "
    "line.lower().split():\n                word = word.strip(\".,;:!?()[]'\\\"\")\n               "
    " "
    "if word:\n                    counts[word] += 1\n    return counts\n\n"
    "if __name__ == \"__main__\":\n    if len(sys.argv) != 2:\n        sys.exit(\"usage: count.py "
    "FILE\")\n    for word, count in count_words(sys.argv[1]).most_common(10):\n        "
    "print(f\"{count:8d}  {word}\")\n\n"
    "For the file \"poem.txt\" it prints:\n\n      41  the\n      27  and\n      19  of\n      12  "
    "sea\n       9  a\n\nNote that \"sea\" and \"Sea\" are counted together, because the line is "
    "turned into lower case first, but \"sea\" and \"seas\" are not. How would you change that?";

constexpr std::array kTexts = {kStory, kEncyclopedia, kDialogue, kProgram};

}  // namespace

std::span<const std::string_view> calibration_texts() { return kTexts; }

}  // namespace sagelm
