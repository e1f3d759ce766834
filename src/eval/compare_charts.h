// What a comparison looks like.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "eval/compare.h"
#include "eval/compare_layers.h"
#include "eval/report.h"

namespace sagelm {

// Per setting after the first a scatter of log-probabilities against the first one's, a histogram
// of all settings' KL divergences, bars of speed, and the error of each layer's attention where
// layers, [setting][layer], is not empty. names are the settings'. Nothing that was not measured is
// drawn.
std::vector<ReportFigure> compare_figures(const Comparison& comparison,
                                          const std::vector<std::string>& names,
                                          std::span<const std::vector<AttentionError>> layers);

}  // namespace sagelm
