// SPDX-License-Identifier: Apache-2.0
// dmu-img map --svg: the disk as a field of cells, and under it the image's file as another.
//
// In the upper field a cell is a stretch of the disk, coloured by what has most of it: which
// image of the chain, compressed or plain, zeroes, or nobody; the fuller the darker. In the
// lower one a cell is a stretch of the file, coloured by where on the disk its longest run
// belongs, from blue at the start to red at the end: what lies in order is a smooth rainbow,
// what is scattered is confetti.

import BlockIO
package import DiskFormats
import Glibc
import SystemIO

extension ImageTool {
  /// Draws a map into a file.
  package static func draw(_ source: ImageSource, into path: String) throws(ImageError) {
    let chain = try source.layers()
    var picture = Picture(chain)
    try rows(of: chain) { row throws(ImageError) in picture.add(row) }
    let file = try toolIO { () throws(IOError) in try PendingFile(path: path) }
    let output = Output(file.store.raw)
    picture.draw(to: output, title: source.path)
    try toolIO { () throws(IOError) in
      try output.finish()
      try file.publish(durable: false)
    }
  }
}

/// A drawing of a map.
private struct Picture {
  private static let columns = 128
  private static let lines = 32
  private static let cell = 7
  private static let margin = 24
  private static let font = "font-family='DejaVu Sans, Verdana, sans-serif'"
  /// One colour for each image of the chain, the last for all that follow.
  private static let depths = ["#2a6fbb", "#3f9d5a", "#c98a1b", "#8d5bb0", "#6b6b6b"]
  private static let zero = "#d7e3ec"
  private static let nobody = "#f4f4f2"

  private let chain: Layers
  private let diskCell: UInt64
  private let fileCell: UInt64
  private let fileSize: UInt64
  /// Bytes of each kind in each cell of the disk: nobody's, zeroes, then plain and compressed
  /// of every depth.
  private var disk: [[UInt64]]
  /// For each cell of the file: bytes of its longest run (of equal ones the one nearest to its
  /// middle), how far that is, and the run's place on the disk as a part of the whole.
  private var file: [(bytes: UInt64, away: Int64, place: Double)]
  private var totals: [UInt64]
  private var extents: UInt64 = 0

  init(_ chain: Layers) {
    self.chain = chain
    let cells = UInt64(Self.columns * Self.lines)
    func unit(_ size: UInt64) -> UInt64 { max(512, ((size + cells - 1) / cells + 511) / 512 * 512) }
    diskCell = unit(chain.size)
    fileSize = max(512, chain.layers[0].devices[0].size)
    fileCell = unit(fileSize)
    let kinds = 2 + 2 * Self.depths.count
    totals = [UInt64](repeating: 0, count: kinds)
    disk = [[UInt64]](repeating: [], count: Int((chain.size + diskCell - 1) / diskCell))
    for index in disk.indices { disk[index] = [UInt64](repeating: 0, count: kinds) }
    file = [(bytes: UInt64, away: Int64, place: Double)](
      repeating: (0, 0, 0), count: Int((fileSize + fileCell - 1) / fileCell))
  }

  private static func kind(_ row: MapRow) -> Int {
    guard row.isPresent else { return 0 }
    guard row.isData else { return 1 }
    return 2 + 2 * min(row.depth, depths.count - 1) + (row.isCompressed ? 1 : 0)
  }

  mutating func add(_ row: MapRow) {
    let kind = Self.kind(row)
    totals[kind] += row.count
    Self.spread(row.start, row.count, diskCell) { disk[$0][kind] += $1 }
    guard row.isData, row.depth == 0 else { return }
    extents += 1
    guard let offset = row.offset, !row.isCompressed, row.store === chain.layers[0].devices[0]
    else { return }
    var done: UInt64 = 0
    Self.spread(offset, row.count, fileCell) { index, count in
      guard index < file.count else { return }
      let middle = UInt64(index) * fileCell + fileCell / 2
      let away = abs(Int64(offset + done + count / 2) - Int64(middle))
      let old = file[index]
      if count > old.bytes || (count == old.bytes && away < old.away) {
        file[index] = (count, away, Double(row.start + done + count / 2) / Double(chain.size))
      }
      done += count
    }
  }

  /// Calls for every cell that a run touches, with how many of its bytes lie there.
  private static func spread(
    _ start: UInt64, _ count: UInt64, _ unit: UInt64, _ body: (Int, UInt64) -> Void
  ) {
    var offset = start
    while offset < start + count {
      let next = min(start + count, (offset / unit + 1) * unit)
      body(Int(offset / unit), next - offset)
      offset = next
    }
  }

  // MARK: Drawing

  private static func color(_ kind: Int) -> String {
    switch kind {
    case 0: nobody
    case 1: zero
    default: depths[(kind - 2) / 2]
    }
  }

  private func name(_ kind: Int) -> String {
    switch kind {
    case 0: return "nowhere (reads as zeroes)"
    case 1: return "zeroes"
    default:
      let depth = (kind - 2) / 2
      let store = depth < chain.layers.count ? chain.layers[depth].store.name : ""
      let base = store.split(separator: "/").last.map(String.init) ?? store
      return base + (kind % 2 == 1 ? ", compressed" : "")
    }
  }

  /// The rainbow from the start of the disk to its end: red, green and blue of each station.
  private static let stations: [(Double, Double, Double)] = [
    (38, 70, 160), (42, 140, 170), (86, 165, 110), (222, 190, 80), (232, 132, 60), (190, 50, 70),
  ]

  /// A colour of the rainbow for a part of the whole.
  private static func rainbow(_ part: Double) -> String {
    let place = max(0, min(1, part)) * Double(stations.count - 1)
    let index = min(Int(place), stations.count - 2)
    let (one, other, rest) = (stations[index], stations[index + 1], place - Double(index))
    // Sixty-four colours are enough, and more cells look the same.
    func mix(_ a: Double, _ b: Double) -> Int { Int(a + (b - a) * (rest * 12).rounded() / 12) }
    func hex(_ value: Int) -> String { (value < 16 ? "0" : "") + String(value, radix: 16) }
    return "#" + hex(mix(one.0, other.0)) + hex(mix(one.1, other.1)) + hex(mix(one.2, other.2))
  }

  /// A colour so far on its way from white.
  private static func tint(_ color: String, _ part: Double) -> String {
    guard part < 1, let value = UInt32(color.dropFirst(), radix: 16) else { return color }
    func hex(_ shift: UInt32) -> String {
      let level = 255 - (255 - Double(value >> shift & 255)) * part
      return (level < 16 ? "0" : "") + String(Int(level), radix: 16)
    }
    return "#" + hex(16) + hex(8) + hex(0)
  }

  func draw(to output: Output, title: String) {
    let width = Self.columns * Self.cell + 2 * Self.margin
    let field = Self.lines * Self.cell
    let legend = totals.indices.filter { totals[$0] > 0 }
    let legendLines = (legend.count + 1) / 2
    let upper = 92
    let lower = upper + field + 70
    let below = lower + field + 56
    let height = below + 24 * legendLines + Self.margin
    output.put(
      "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 \(width) \(height)' "
        + "width='\(width)' height='\(height)' role='img'>\n<title>Map of \(Self.escaped(title))"
        + "</title>\n<defs><pattern id='c' width='4' height='4' patternUnits='userSpaceOnUse'>"
        + "<path d='M0 4L4 0' stroke='#fff' stroke-opacity='.55'/></pattern>"
        + "<linearGradient id='r'>")
    for step in 0...8 {
      output.put(
        "<stop offset='\(step * 125 / 10)%' stop-color='\(Self.rainbow(Double(step) / 8))'/>")
    }
    output.put("</linearGradient></defs>\n<rect width='100%' height='100%' fill='#fff'/>\n")
    text(title, 40, size: 18, weight: "bold", to: output)
    let allocated = totals[2...].reduce(0, +)
    text(
      "\(chain.layers[0].kind.name), a disk of \(Words.size(chain.size)), "
        + "\(Words.size(allocated)) of it somewhere; \(extents) extents in this image", 62,
      size: 12, to: output)
    text("The disk: \(Words.size(diskCell)) a cell", upper - 8, size: 12, to: output)
    frame(upper, disk.count, to: output)
    drawDisk(at: upper, to: output)
    text(
      "The file, \(Words.size(fileSize)): \(Words.size(fileCell)) a cell, coloured by its place "
        + "on the disk", lower - 8, size: 12, to: output)
    frame(lower, file.count, to: output)
    drawFile(at: lower, to: output)
    let scale = lower + field + 12
    output.put(
      "<rect x='\(Self.margin)' y='\(scale)' width='240' height='8' fill='url(#r)'/>\n")
    output.put(
      "<text x='\(Self.margin + 250)' y='\(scale + 8)' font-size='11' \(Self.font) fill='#555'>"
        + "start to end of the disk</text>\n")
    for (number, kind) in legend.enumerated() {
      let x = Self.margin + number % 2 * (width / 2 - Self.margin)
      let y = below + number / 2 * 24
      rectangle(x, y, 14, 14, Self.color(kind), kind >= 2 && kind % 2 == 1, to: output)
      output.put(
        "<text x='\(x + 22)' y='\(y + 12)' font-size='12' \(Self.font) fill='#222'>"
          + "\(Self.escaped(name(kind))): \(Words.size(totals[kind]))</text>\n")
    }
    output.put("</svg>\n")
  }

  private func text(
    _ words: String, _ y: Int, size: Int, weight: String = "normal", to output: Output
  ) {
    output.put(
      "<text x='\(Self.margin)' y='\(y)' font-size='\(size)' font-weight='\(weight)' "
        + "\(Self.font) fill='#222'>\(Self.escaped(words))</text>\n")
  }

  /// The field's ground: as many cells as there are.
  private func frame(_ y: Int, _ cells: Int, to output: Output) {
    let full = cells / Self.columns
    let rest = cells % Self.columns
    rectangle(
      Self.margin, y, Self.columns * Self.cell, full * Self.cell, "#fbfbfa", false, to: output)
    rectangle(
      Self.margin, y + full * Self.cell, rest * Self.cell, Self.cell, "#fbfbfa", false, to: output)
  }

  private func rectangle(
    _ x: Int, _ y: Int, _ width: Int, _ height: Int, _ color: String, _ isHatched: Bool,
    to output: Output
  ) {
    guard width > 0, height > 0 else { return }
    let place = "<rect x='\(x)' y='\(y)' width='\(width)' height='\(height)' fill="
    output.put(place + "'\(color)'/>\n")
    if isHatched { output.put(place + "'url(#c)'/>\n") }
  }

  /// Cells side by side that look the same are one rectangle.
  private func drawCells(
    _ count: Int, at y: Int, to output: Output, look: (Int) -> (color: String, hatched: Bool)?
  ) {
    var index = 0
    while index < count {
      let column = index % Self.columns
      let now = look(index)
      var next = index + 1
      while next < count, next % Self.columns != 0, next - index < Self.columns - column,
        look(next)?.color == now?.color, look(next)?.hatched == now?.hatched
      {
        next += 1
      }
      if let now {
        rectangle(
          Self.margin + column * Self.cell, y + index / Self.columns * Self.cell,
          (next - index) * Self.cell, Self.cell - 1, now.color, now.hatched, to: output)
      }
      index = next
    }
  }

  private func drawDisk(at y: Int, to output: Output) {
    drawCells(disk.count, at: y, to: output) { index in
      let cell = disk[index]
      // Data is seen before zeroes, however little it is.
      let data = cell.indices.dropFirst(2).max { cell[$0] < cell[$1] } ?? 2
      let kind = cell[data] > 0 ? data : cell[1] > 0 ? 1 : 0
      guard kind >= 2 else { return (Self.color(kind), false) }
      // The fuller, the darker, in six steps.
      let full = Double(cell[2...].reduce(0, +)) / Double(diskCell)
      return (Self.tint(Self.color(kind), 0.4 + 0.1 * (full * 6).rounded(.up)), kind % 2 == 1)
    }
  }

  private func drawFile(at y: Int, to output: Output) {
    drawCells(file.count, at: y, to: output) { index in
      let (bytes, _, place) = file[index]
      guard bytes > 0 else { return ("#e9e9e6", false) }
      return (Self.rainbow(place), false)
    }
  }

  private static func escaped(_ text: String) -> String {
    var result = ""
    for character in text.unicodeScalars {
      switch character {
      case "&": result += "&amp;"
      case "<": result += "&lt;"
      case ">": result += "&gt;"
      case "'": result += "&#39;"
      case let other where other.value < 32: result += " "
      default: result.unicodeScalars.append(character)
      }
    }
    return result
  }
}
