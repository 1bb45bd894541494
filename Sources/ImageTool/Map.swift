// SPDX-License-Identifier: Apache-2.0
// dmu-img map: what of the disk is where, as lines, as JSON in qemu-img's words, or drawn.

import BlockIO
package import DiskFormats
package import SystemIO

/// A run of the disk in a map.
struct MapRow {
  var start: UInt64
  var count: UInt64
  /// Which image says so, from the top.
  var depth: Int
  /// Whether some image says anything of it.
  var isPresent: Bool
  var isZero: Bool
  var isData: Bool
  var isCompressed: Bool
  /// Where it lies in its file.
  var offset: UInt64?
  var store: (any ByteStore)?

  /// Whether another run goes on where this one ends.
  func continues(with next: MapRow) -> Bool {
    guard depth == next.depth, isPresent == next.isPresent, isZero == next.isZero,
      isData == next.isData, isCompressed == next.isCompressed, store === next.store
    else { return false }
    guard let offset, !isCompressed else { return next.offset == nil || isCompressed }
    return offset + count == next.offset
  }
}

extension ImageTool {
  /// How a map is given.
  package enum MapForm: Sendable {
    /// Lines, of data only.
    case text
    /// JSON, of everything.
    case json
  }

  /// Says where the bytes of a disk are, from one on and for so many.
  package static func map(
    _ source: ImageSource, start: UInt64 = 0, count: UInt64? = nil, form: MapForm,
    to output: Output
  ) throws(ImageError) {
    let chain = try source.layers()
    let isText = form == .text
    if isText { output.put("Offset          Length          Mapped to       File\n") }
    var isFirst = true
    try rows(of: chain, from: start, count: count) { row in
      if isText { return line(row, to: output) }
      output.put(known: isFirst ? "[{ \"start\": " : ",\n{ \"start\": ")
      isFirst = false
      object(row, to: output)
    }
    if !isText { output.put(isFirst ? "[]\n" : "]\n") }
  }

  private static func line(_ row: MapRow, to output: Output) {
    guard row.isData, let store = row.store else { return }
    output.put(hexadecimal: row.start, width: 16)
    output.put(hexadecimal: row.count, width: 16)
    if let offset = row.offset, !row.isCompressed {
      output.put(hexadecimal: offset, width: 16)
    } else {
      output.put(known: "compressed      ")
    }
    output.put(store.name)
    output.put(known: "\n")
  }

  private static func object(_ row: MapRow, to output: Output) {
    output.put(row.start)
    output.put(known: ", \"length\": ")
    output.put(row.count)
    output.put(known: ", \"depth\": ")
    output.put(UInt64(row.depth))
    output.put(known: row.isPresent ? ", \"present\": true" : ", \"present\": false")
    output.put(known: row.isZero ? ", \"zero\": true" : ", \"zero\": false")
    output.put(known: row.isData ? ", \"data\": true" : ", \"data\": false")
    if row.isCompressed { output.put(known: ", \"compressed\": true") }
    if let offset = row.offset, !row.isCompressed {
      output.put(known: ", \"offset\": ")
      output.put(offset)
    }
    output.put(known: "}")
  }

  /// The runs of a disk in order, as long as they can be.
  static func rows(
    of chain: Layers, from start: UInt64 = 0, count: UInt64? = nil,
    visit: (MapRow) throws(ImageError) -> Void
  ) throws(ImageError) {
    guard start <= chain.size else {
      throw ImageError(.badRequest, "byte \(start) of a disk of \(chain.size) bytes")
    }
    let end = start + min(count ?? .max, chain.size - start)
    let reader = DiskReader(chain)
    var last: MapRow?
    var offset = start
    while offset < end {
      var row = try row(of: chain, reader, at: offset, limit: end - offset)
      offset += row.count
      if let before = last {
        if before.continues(with: row) {
          row.start = before.start
          row.count += before.count
          row.offset = before.offset
        } else {
          try visit(before)
        }
      }
      last = row
    }
    if let last { try visit(last) }
  }

  private static func row(
    of chain: Layers, _ reader: DiskReader, at offset: UInt64, limit: UInt64
  ) throws(ImageError) -> MapRow {
    let run = try chain.run(at: offset, limit: limit)
    var row = MapRow(
      start: offset, count: run.count, depth: run.depth ?? 0, isPresent: run.depth != nil,
      isZero: true, isData: false, isCompressed: false, offset: nil, store: nil)
    switch run.content {
    case .absent, .zero: return row
    case .made(_, let place):
      row.isZero = false
      row.isData = true
      row.isCompressed = true
      row.offset = place
      row.store = run.depth.map { chain.layers[$0].store }
    case .data(let store, let place):
      row.offset = place
      row.store = store
      row.isZero = false
      row.isData = true
      // Holes of a plain file are known to read as zeroes; in an image the image has the word.
      guard let depth = run.depth, chain.layers[depth].kind == .raw else { return row }
      let (isHole, count) = try reader.hole(store, at: place, limit: run.count)
      row.count = count
      row.isZero = isHole
      row.isData = !isHole
    }
    return row
  }
}
