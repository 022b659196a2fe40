// Frames into groups, the work of `_place` in train/sampler.py. Loads are integers in floating point whose products and
// sums are below 2^53 and so exact, in whatever order they come and however they are fused.

#include <cstdint>
#include <limits>
#include <vector>

namespace {

constexpr int64_t LANES = 8;  // groups side by side

// The loads of all groups, one kind after the other; the last groups, up to a multiple of LANES, take nothing.
struct Groups {
    int64_t n, n_loads;
    std::vector<double> taken, full, score;

    Groups(const int64_t* most, int64_t n_groups, int64_t n_loads)
        : n((n_groups + LANES - 1) / LANES * LANES),
          n_loads(n_loads),
          taken(n * n_loads),
          full(n, std::numeric_limits<double>::infinity()),
          score(n) {
        for (int64_t group = 0; group < n_groups; group++)
            if (most[group] > 0) full[group] = 0;
    }

    // The first group whose load has the smallest product with a frame's.
    int64_t choose(const double* load) {
        score = full;
        for (int64_t kind = 0; kind < n_loads; kind++) {
            const double* of_kind = taken.data() + kind * n;
            for (int64_t group = 0; group < n; group++) score[group] += of_kind[group] * load[kind];
        }
        double least[LANES];
        for (int64_t lane = 0; lane < LANES; lane++) least[lane] = score[lane];
        for (int64_t group = LANES; group < n; group += LANES)
            for (int64_t lane = 0; lane < LANES; lane++)
                least[lane] = score[group + lane] < least[lane] ? score[group + lane] : least[lane];
        for (int64_t lane = 1; lane < LANES; lane++) least[0] = least[lane] < least[0] ? least[lane] : least[0];
        int64_t group = 0;
        while (score[group] > least[0]) group++;
        return group;
    }

    void add(int64_t group, const double* load) {
        for (int64_t kind = 0; kind < n_loads; kind++) taken[kind * n + group] += load[kind];
    }
};

}  // namespace

// loads [n_frames, n_loads], most [n_groups] -> group_of [n_frames]; n_groups > 0.
extern "C" void place_frames(const double* loads, const int64_t* most, int64_t* group_of, int64_t n_frames,
                             int64_t n_loads, int64_t n_groups) {
    Groups groups(most, n_groups, n_loads);
    std::vector<int64_t> room(most, most + n_groups);
    for (int64_t frame = 0; frame < n_frames; frame++, loads += n_loads) {
        const int64_t chosen = group_of[frame] = groups.choose(loads);
        groups.add(chosen, loads);
        if (--room[chosen] == 0) groups.full[chosen] = std::numeric_limits<double>::infinity();
    }
}
