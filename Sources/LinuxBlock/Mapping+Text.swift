// SPDX-License-Identifier: Apache-2.0
// A mapping as the words of a table line.

extension Mapping {
  /// The name of the target.
  package var target: String {
    switch self {
    case .linear: "linear"
    case .error: "error"
    case .zero: "zero"
    case .striped: "striped"
    case .mirror: "mirror"
    case .snapshot: "snapshot"
    case .delay: "delay"
    case .flakey: "flakey"
    case .userspace: "userspace"
    }
  }

  /// The words after the target's name.
  package var parameters: String { words.joined(separator: " ") }

  private var words: [String] {
    switch self {
    case .error, .zero: []
    case .linear(let location): location.words
    case .striped(let chunk, let stripes):
      ["\(stripes.count)", "\(chunk)"] + stripes.flatMap(\.words)
    case .mirror(let mirror): mirror.words
    case .snapshot(let snapshot): snapshot.words
    case .delay(let delay):
      [delay.reads, delay.writes, delay.flushes].compactMap { $0 }.flatMap { way in
        way.location.words + ["\(way.milliseconds)"]
      }
    case .flakey(let flakey):
      flakey.location.words + ["\(flakey.up)", "\(flakey.down)"]
        + (flakey.onlyWrites ? ["1", "error_writes"] : [])
    case .userspace(let device): device.words
    }
  }
}

extension DeviceReference {
  /// As one word: white space and backslashes of a path are quoted. Source: dm-table.c.
  var word: String {
    "\(self)".reduce(into: "") { word, letter in
      if letter.isWhitespace || letter == "\\" { word += "\\" }
      word.append(letter)
    }
  }
}

extension Location {
  var words: [String] { [device.word, "\(offset)"] }
}

extension Mirror {
  var words: [String] {
    var log: [String] = ["\(region)"]
    var words = ["core"]
    if case .disk(let device) = self.log {
      words = ["disk"]
      log.insert(device.word, at: 0)
    }
    if let inSync { log.append(inSync ? "sync" : "nosync") }
    words += ["\(log.count)"] + log + ["\(legs.count)"] + legs.flatMap(\.words)
    let features =
      (handlesErrors ? ["handle_errors"] : []) + (keepsLog ? ["keep_log"] : [])
    return words + (features.isEmpty ? [] : ["\(features.count)"] + features)
  }
}

extension Snapshot {
  var words: [String] {
    let words = [origin.word, store.word, persistence.rawValue, "\(chunk)"]
    return words + (features.isEmpty ? [] : ["\(features.count)"] + features.map(\.rawValue))
  }
}

extension Userspace {
  var words: [String] {
    var words = [name, "\(blockSectors)", "\(devices.count)"]
    words += devices.map { ($0.readOnly ? "ro:" : "") + $0.device.word }
    return words + (faultTimeout == 0 ? [] : ["2", "fault_timeout", "\(faultTimeout)"])
  }
}
