// SPDX-License-Identifier: Apache-2.0
// Opening a saved index, mapped or read and checked, and verifying its files.
#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <system_error>

#include "common/exact_floats.h"
#include "common/file.h"
#include "common/json.h"
#include "search/index_files.h"
#include "search/index_impl.h"
#include "search/rotation.h"

namespace knnfast {
namespace {

int index_of(const std::string& name, const char* const (&names)[3], const char* what) {
  for (int i = 0; i < 3; ++i)
    if (name == names[i]) return i;
  throw std::runtime_error(std::string("\"") + what + "\" is " + quoted(name));
}

FileEntry entry_of(const Json& segment, const std::string& key, uint64_t bytes) {
  const Json& e = segment.at(key, Json::object);
  FileEntry f;
  f.name = e.at("name", Json::string).text;
  f.bytes = static_cast<uint64_t>(e.integer_at("bytes", 0, INT64_MAX));
  f.crc = static_cast<uint32_t>(e.integer_at("crc32c", 0, UINT32_MAX));
  if (!payload_name(f.name)) throw std::runtime_error("a bad file name: " + quoted(f.name));
  if (f.bytes != bytes)
    throw std::runtime_error(quoted(f.name) + " should have " + std::to_string(bytes) +
                             " bytes, not " + std::to_string(f.bytes));
  return f;
}

Json read_manifest(const std::string& path) {
  File f(path, O_RDONLY);
  const uint64_t size = f.size();
  if (size > (uint64_t{64} << 20)) damaged(path, "it is larger than any manifest");
  std::string text(size, '\0');
  f.read(&text[0], size);
  const std::string open = "{\"crc32c\":", middle = ",\"index\":";
  const size_t at = text.find(middle);
  if (text.rfind(open, 0) != 0 || at == std::string::npos || text.size() < 2 ||
      text.substr(text.size() - 2) != "}\n")
    damaged(path, "not a knnfast index");
  const char* begin = text.data() + at + middle.size();
  const char* end = text.data() + text.size() - 2;
  const std::string sum = text.substr(open.size(), at - open.size());
  if (begin > end || sum != std::to_string(crc32c(begin, static_cast<size_t>(end - begin))))
    damaged(path, "its checksum is wrong");
  try {
    return parse_json(begin, end);
  } catch (const std::runtime_error& e) {
    damaged(path, e.what());
  }
}

// A payload: mapped, or read and checked.
std::shared_ptr<Buffer> load(const std::string& folder, const FileEntry& entry, bool map) {
  const std::string path = folder + "/" + entry.name;
  File f(path, O_RDONLY);
  if (f.size() != entry.bytes)
    damaged(path, "it has " + std::to_string(f.size()) + " bytes, the manifest says " +
                      std::to_string(entry.bytes));
  if (map) return std::make_shared<Buffer>(Buffer::map_file(f.fd(), entry.bytes));
  auto b = std::make_shared<Buffer>(Buffer::reserve(entry.bytes));
  f.read(b->as<char>(), entry.bytes);
  if (crc32c(b->as<char>(), entry.bytes) != entry.crc) damaged(path, "its checksum is wrong");
  return b;
}

// Whether a payload is there as the manifest says. Throws where that cannot be told.
bool intact(const std::string& folder, const FileEntry& entry) {
  try {
    File f(folder + "/" + entry.name, O_RDONLY);
    std::vector<char> part(size_t{1} << 20);
    uint64_t left = f.size();
    if (left != entry.bytes) return false;
    uint32_t crc = 0;
    while (left) {
      const size_t n = static_cast<size_t>(std::min<uint64_t>(left, part.size()));
      f.read(part.data(), n);
      crc = crc32c(part.data(), n, crc);
      left -= n;
    }
    return crc == entry.crc;
  } catch (const DamagedFile&) {  // it is no file, or became shorter meanwhile
    return false;
  } catch (const std::system_error& e) {
    if (e.code().value() != ENOENT) throw;
    return false;
  }
}

Buffer copy_floats(const float* from, size_t n) {
  Buffer b = Buffer::reserve(n * 4);
  std::memcpy(b.as<float>(), from, n * 4);
  return b;
}

// The one rotation of an index.
struct LoadedRotation {
  FileEntry entry;
  std::shared_ptr<const Rotation> rotation;

  std::shared_ptr<const Rotation> get(const std::string& folder, const FileEntry& wanted,
                                      int64_t dim) {
    if (rotation) {
      if (wanted.name != entry.name || wanted.crc != entry.crc)
        throw std::runtime_error("segments with different rotations");
      return rotation;
    }
    entry = wanted;
    const std::shared_ptr<Buffer> file = load(folder, entry, false);
    const float* rows = file->as<float>();
    rotation = Rotation::from_rows(rows, dim, rows + dim * dim);
    if (!rotation->orthogonal()) damaged(folder + "/" + entry.name, "it is no rotation");
    return rotation;
  }
};

SegmentView load_segment(const std::string& folder, const Json& j, int64_t version, int64_t dim,
                         bool map, std::vector<FileEntry>& files, LoadedRotation& rotation) {
  SegmentView v;
  const uint64_t n = static_cast<uint64_t>(j.integer_at("rows", 1, int64_t{1} << 31));
  const uint64_t d = static_cast<uint64_t>(dim);
  v.n = static_cast<uint32_t>(n);
  v.sealed = true;
  const bool own_ids = j.fields.count("ids") > 0;
  if (!own_ids) v.first_id = j.integer_at("first_id", 0, INT64_MAX - static_cast<int64_t>(n));
  v.segment = std::make_shared<Segment>();
  v.segment->capacity = static_cast<int64_t>(n);
  const bool coded = j.fields.count("codes") > 0;
  const uint64_t whole = n / kBlockRows * kBlockRows;
  // Rows are read up to 64 bytes at a time, but never past the last one.
  const FileEntry rows = entry_of(j, "vectors", n * d * 2);
  const FileEntry terms = entry_of(j, "terms", (n + (coded ? d + 3 * whole : 0)) * 4);
  files.push_back(rows);
  files.push_back(terms);
  v.segment->rows = std::move(*load(folder, rows, map));
  const std::shared_ptr<Buffer> floats = load(folder, terms, map);
  const float* f = floats->as<float>();
  v.segment->row_norm = copy_floats(f, n);
  if (coded) {
    const FileEntry codes = entry_of(
        j, "codes", whole * static_cast<uint64_t>(code_groups(dim)) * kBlockDims + kCodesSlack);
    files.push_back(codes);
    v.codes = std::make_shared<Codes>();
    v.codes->mean.assign(f + n, f + n + d);
    double square = 0;
    for (float m : v.codes->mean) square += static_cast<double>(m) * m;
    v.codes->mean_norm = std::sqrt(square);
    v.codes->mean_rows = static_cast<int64_t>(n);
    v.codes->scale = copy_floats(f + n + d, whole);
    v.codes->bounds = copy_floats(f + n + d + whole, whole);
    v.codes->norm = copy_floats(f + n + d + 2 * whole, whole);
    if (version < 3)  // nothing is known of the norms behind the stops
      for (uint64_t i = 0; i < whole; ++i) {
        uint32_t& bounds = v.codes->bounds.as<uint32_t>()[i];
        bounds = (version == 1 ? residual_up(bounds) : bounds) | 0xffff;
      }
    v.codes->codes = std::move(*load(folder, codes, map));
    if (j.fields.count("rotation")) {
      if (version < 4 || dim > kMaxRotated) throw std::runtime_error("a rotation out of place");
      const FileEntry entry = entry_of(j, "rotation", (d * d + 1) * 4);
      if (!rotation.rotation) files.push_back(entry);
      v.codes->rotation = rotation.get(folder, entry, dim);
      v.codes->rotate_mean();
    }
  }
  if (own_ids) {
    const FileEntry ids = entry_of(j, "ids", n * 8);
    files.push_back(ids);
    v.ids = load(folder, ids, map);
  }
  if (j.fields.count("live")) {
    const FileEntry live = entry_of(j, "live", (n / kBlockRows + 1) * 2);
    files.push_back(live);
    const std::shared_ptr<Buffer> bits = load(folder, live, map);
    const uint16_t* w = bits->as<uint16_t>();
    v.live = std::make_shared<LiveMask>(w, w + n / kBlockRows + 1);
  }
  return v;
}

// Whether the manifest of a folder is a good one and names none of these files any more.
bool saved_anew(const std::string& folder, const std::vector<FileEntry>& files) {
  try {
    const Json j = read_manifest(folder + "/" + kManifest);
    for (const Json& segment : j.at("segments", Json::array).items) {
      const std::string& name = segment.at("vectors", Json::object).at("name", Json::string).text;
      for (const FileEntry& f : files)
        if (f.name == name) return false;
    }
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

}  // namespace

Index Index::open(const std::string& folder, bool map) {
  const ExactFloats mode;
  const std::string path = folder + "/" + kManifest;
  const auto once = [&] {
    const Json j = read_manifest(path);
    std::unique_ptr<Impl> impl(new Impl);
    try {
      if (j.kind != Json::object || j.at("format", Json::string).text != "knnfast-index")
        throw std::runtime_error("not a knnfast index");
      const int64_t version = j.integer_at("version", 1, INT64_MAX);
      if (version > kFormatVersion)
        throw std::runtime_error("written by a newer knnfast: format " + std::to_string(version) +
                                 ", this one reads 1 to " + std::to_string(kFormatVersion));
      impl->dim = j.integer_at("dim", 1, kMaxDim);
      impl->metric = Metric(index_of(j.at("metric", Json::string).text, kMetricNames, "metric"));
      impl->scan = Scan(index_of(j.at("scan", Json::string).text, kScanNames, "scan"));
      impl->next_id = j.integer_at("next_id", 0, INT64_MAX);
      auto snapshot = std::make_shared<Snapshot>();
      LoadedRotation rotation;
      for (const Json& segment : j.at("segments", Json::array).items)
        snapshot->push_back(
            load_segment(folder, segment, version, impl->dim, map, impl->files, rotation));
      for (const SegmentView& v : *snapshot)
        for (uint32_t r = 0; r < v.n; ++r) {
          const int64_t id = v.id(r);
          if (id < 0 || id >= impl->next_id) throw std::runtime_error("an id is out of range");
          impl->ascending = impl->ascending && id > impl->last_id;
          impl->last_id = std::max(impl->last_id, id);
          impl->live += v.alive(r);
        }
      if (!impl->ascending) {
        impl->map = IdMap().with_room(static_cast<size_t>(impl->live));
        for (size_t s = 0; s < snapshot->size(); ++s)
          for (uint32_t r = 0; r < (*snapshot)[s].n; ++r)
            if ((*snapshot)[s].alive(r) &&
                !impl->map.insert((*snapshot)[s].id(r), uint64_t{s} << 32 | r))
              throw std::runtime_error("an id comes twice");
      }
      impl->current = snapshot;
    } catch (const DamagedFile&) {
      throw;
    } catch (const std::system_error&) {
      throw;
    } catch (const std::runtime_error& e) {
      for (const FileEntry& f : impl->files)  // mapped ones were not checked
        if (!intact(folder, f)) damaged(folder + "/" + f.name, "its checksum is wrong");
      damaged(path, e.what());
    }
    impl->folder = real_path(folder);
    return Index(std::move(impl));
  };
  for (;;) {
    struct stat before, after;
    const bool there = stat(path.c_str(), &before) == 0;
    try {
      return once();
    } catch (const std::system_error& e) {
      // Another process has saved meanwhile, and removed what the manifest named?
      const bool again =
          there && e.code().value() == ENOENT && stat(path.c_str(), &after) == 0 &&
          (before.st_ino != after.st_ino || before.st_mtim.tv_nsec != after.st_mtim.tv_nsec);
      if (!again) throw;
    }
  }
}

std::vector<std::string> Index::verify() const {
  std::string folder;
  std::vector<FileEntry> files;
  {
    std::shared_lock<std::shared_mutex> lock(impl_->state);
    folder = impl_->folder;
    files = impl_->files;
  }
  std::vector<std::string> out;
  for (const FileEntry& file : files)  // on this thread: searches want the others
    if (!intact(folder, file)) out.push_back(folder + "/" + file.name);
  if (!out.empty() && saved_anew(folder, files))
    throw std::system_error(ENOENT, std::generic_category(),
                            folder + " was saved anew since it was opened: open it again");
  return out;
}

}  // namespace knnfast
